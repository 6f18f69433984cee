"""Hugging Face models in and out: what is saved loads to the same bits, compressed and dense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import s3tensor as s3
from s3tensor import hf, llm, ops

transformers = pytest.importorskip("transformers")

from tiny_models import FAMILIES, VOCABULARY, logits, pruned, tiny, token_ids  # noqa: E402 - needs transformers


def sparse_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if isinstance(p, s3.StructuredSparseTensor)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_compressed_model_reloads_to_the_same_logits(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = pruned(kind, dtype)
    expected = logits(model)
    s3.save_pretrained(model, tmp_path)
    found = s3.from_pretrained(tmp_path)
    assert torch.equal(logits(found), expected)
    assert found.dtype == dtype
    assert sparse_names(found) == sparse_names(model) != set()
    assert not any(p.requires_grad for p in found.parameters())
    assert not found.training


@pytest.mark.parametrize("pattern", ["coupled2:4", "rowpair16", "block:4x4@0.5"])
def test_other_patterns_reload_to_the_same_logits(tmp_path: Path, pattern: str) -> None:
    model = pruned("gpt2", pattern=pattern)
    s3.save_pretrained(model, tmp_path)
    assert torch.equal(logits(s3.from_pretrained(tmp_path)), logits(model))
    assert {row[1] for row in s3.verify(tmp_path)} == {pattern}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_dense_export_loads_with_transformers_alone(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = pruned(kind, dtype)
    for module in model.modules():
        if structure_linear(module):
            assert isinstance(module.weight, s3.StructuredSparseTensor)
    s3.save_pretrained(model, tmp_path, dense=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert type(found) is type(model)
    assert not sparse_names(found)
    for name in sparse_names(model):
        assert torch.equal(found.get_parameter(name), model.get_parameter(name).to_dense()), name
    # The same weights in another memory layout (Conv1D), so another order of sums.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits(found), logits(model), rtol=tolerance, atol=tolerance)


def structure_linear(module: nn.Module) -> bool:
    """A linear inside a decoder block of these models, which is to say all but the head."""
    return llm.structure.is_linear(module) and module.weight.shape[0] != VOCABULARY


def test_tied_embeddings_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = pruned("llama, tied")
    s3.save_pretrained(model, tmp_path / "compressed")
    s3.save_pretrained(model, tmp_path / "dense", dense=True)
    from safetensors import safe_open

    with safe_open(tmp_path / "compressed" / hf.WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" not in load_file(tmp_path / "dense" / "model.safetensors")
    found = s3.from_pretrained(tmp_path / "compressed")
    assert found.lm_head.weight is found.model.embed_tokens.weight
    dense, compressed = hf.weight_bytes(found)[1], hf.weight_bytes(found)[0]
    assert dense == sum(p.numel() * p.element_size() for p in found.parameters())
    assert compressed < dense


def test_loading_makes_no_dense_copy_of_a_compressed_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pruned("llama")
    s3.save_pretrained(model, tmp_path)

    def refused(*_: Any) -> Any:
        raise AssertionError("unpacked while loading")

    monkeypatch.setattr(ops, "unpack", refused)
    monkeypatch.setattr(s3.StructuredSparseTensor, "to_dense", refused)
    found = s3.from_pretrained(tmp_path)
    assert sparse_names(found) == sparse_names(model)
    stored = hf.weight_bytes(found)[0]
    assert (tmp_path / hf.WEIGHTS).stat().st_size < stored + 16_000  # and the header


def test_bytes_in_memory_and_on_disk_are_those_of_the_pattern(tmp_path: Path) -> None:
    model = pruned("llama", torch.bfloat16)
    now, dense = hf.weight_bytes(model)
    weights = [model.get_parameter(name) for name in sparse_names(model)]
    saved = sum(w.numel() for w in weights) * 2 * (1 - 0.5625)
    assert dense - now == saved


def test_a_dense_model_may_be_saved_compressed_too(tmp_path: Path) -> None:
    model = tiny("llama")
    s3.save_pretrained(model, tmp_path)
    assert torch.equal(logits(s3.from_pretrained(tmp_path)), logits(model))
    assert s3.verify(tmp_path) == []


def test_generation_goes_on_after_reloading(tmp_path: Path) -> None:
    model = pruned("llama")
    model.generation_config.max_new_tokens = 7
    s3.save_pretrained(model, tmp_path)
    found = s3.from_pretrained(tmp_path)
    prompt = token_ids(5)
    expected = model.generate(prompt, do_sample=False, pad_token_id=0)
    assert torch.equal(found.generate(prompt, do_sample=False, pad_token_id=0), expected)
    assert expected.shape[1] <= 12


# refusals -------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    "present", [hf.OLD_WEIGHTS, hf.WEIGHTS, "config.json", "model-00001-of-00002.safetensors"]
)
def test_a_folder_with_a_model_is_refused_and_left_alone(
    tmp_path: Path, present: str, dense: bool
) -> None:
    (tmp_path / present).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(s3.CheckpointError, match="nothing was overwritten"):
        s3.save_pretrained(tiny("llama"), tmp_path, dense=dense)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_model_is_replaced_as_a_whole_when_asked_for(
    tmp_path: Path, before: bool, dense: bool
) -> None:
    s3.save_pretrained(tiny("llama"), tmp_path, dense=before)
    model = pruned("llama")
    s3.save_pretrained(model, tmp_path, dense=dense, overwrite=True)
    weights = [path.name for path in tmp_path.glob("*.safetensors")]
    assert weights == ["model.safetensors" if dense else hf.WEIGHTS]
    load = transformers.AutoModelForCausalLM.from_pretrained if dense else s3.from_pretrained
    torch.testing.assert_close(logits(load(tmp_path).eval()), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense", [True, False])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, dense: bool) -> None:
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(s3.CheckpointError) as refused:
            s3.save_pretrained(tiny("llama"), place, dense=dense)
        assert "\n" not in str(refused.value)


def test_a_model_without_a_config_or_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(s3.ModelError, match="no Hugging Face config"):
        s3.save_pretrained(nn.Linear(4, 4), tmp_path)
    with pytest.raises(s3.ModelError, match="meta device"):
        s3.save_pretrained(tiny("llama").to("meta"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    s3.save_pretrained(pruned("llama"), folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_model_is_refused(copy: Path, share: float) -> None:
    data = (copy / hf.WEIGHTS).read_bytes()
    (copy / hf.WEIGHTS).write_bytes(data[: int(len(data) * share)])
    for read in (s3.from_pretrained, s3.verify):
        with pytest.raises(s3.CheckpointError, match="truncated or altered"):
            read(copy)


def test_an_altered_model_is_refused(copy: Path) -> None:
    data = bytearray((copy / hf.WEIGHTS).read_bytes())
    data[len(data) // 2] ^= 4
    (copy / hf.WEIGHTS).write_bytes(data)
    for read in (s3.from_pretrained, s3.verify):
        with pytest.raises(s3.CheckpointError, match="checksum of"):
            read(copy)


def config_with(folder: Path, **change: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 48}, "does not fit its own config"),
        ({"num_hidden_layers": 3}, "missing from the file"),
        ({"num_hidden_layers": 1}, "unknown to the model"),
        ({"model_type": "no such type"}, "cannot be used"),
        ({"hidden_act": "no such function"}, "cannot be used"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "cannot be used"),
    ],
    ids=["wider", "more blocks", "fewer blocks", "type", "activation", "code"],
)
def test_a_config_of_another_model_is_refused(
    copy: Path, change: dict[str, Any], message: str
) -> None:
    config_with(copy, **change)
    with pytest.raises(s3.CheckpointError, match=message) as refused:
        s3.from_pretrained(copy)
    assert "\n" not in str(refused.value)


def test_missing_files_are_named(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(s3.CheckpointError, match="holds no compressed model"):
        s3.from_pretrained(tmp_path / "nothing")
    (copy / "config.json").write_text("{")
    with pytest.raises(s3.CheckpointError, match=r"config\.json cannot be used"):
        s3.from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(s3.CheckpointError, match=r"config\.json cannot be used"):
        s3.from_pretrained(copy)


# verify ---------------------------------------------------------------------------------------------


def test_verify_lists_every_sparse_weight_of_a_model_and_of_a_folder(saved: Path) -> None:
    rows = s3.verify(saved)
    assert len(rows) == 14
    assert {(pattern, density) for _, pattern, density in rows} == {("2:4", 0.5)}
    assert sorted(s3.verify(s3.from_pretrained(saved))) == sorted(rows)
    assert sorted(s3.verify(saved / hf.WEIGHTS)) == sorted(rows)


def test_verify_of_what_has_nothing_to_verify_says_so(tmp_path: Path) -> None:
    s3.save_pretrained(tiny("llama"), tmp_path / "dense", dense=True)
    with pytest.raises(s3.CheckpointError, match="holds a dense model, without patterns"):
        s3.verify(tmp_path / "dense")
    with pytest.raises(s3.CheckpointError, match="holds no model"):
        s3.verify(tmp_path)
    with pytest.raises(s3.CheckpointError, match="does not exist"):
        s3.verify(tmp_path / "nothing")


def test_verify_refuses_nan_anywhere() -> None:
    model = pruned("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(s3.CheckpointError, match=r"model\.norm\.weight holds NaN"):
        s3.verify(model)
    model = pruned("llama")
    model.model.layers[0].mlp.up_proj.weight.packed[0] = float("inf")
    with pytest.raises(s3.CheckpointError, match=r"up_proj\.weight holds NaN"):
        s3.verify(model)


# load_model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_a_compressed_model_is_loaded_in_the_dtype_that_is_asked_for(
    saved: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf, "_tokenizer", lambda folder: None)
    asked, _ = hf.load_model(saved, dtype)
    as_stored, _ = hf.load_model(saved)
    for (name, one), other in zip(asked.named_parameters(), as_stored.parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other.to(torch.bfloat16)), name
    with pytest.raises(s3.ModelError, match="'bfloat' is no dtype of torch"):
        hf.load_model(saved, "bfloat")


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_bytes(b"x")
    for place, message in (
        (tmp_path / "empty", r"no config\.json"),
        (tmp_path / "nothing", "no model at"),
        (tmp_path / "nothing.gguf", "no GGUF file"),
        (tmp_path / "weights.bin", "is a file"),
        (Path("no/such/folder"), "no model at"),
        (Path("no-such-owner/no-such-model"), "cannot load a model"),
    ):
        with pytest.raises(s3.ModelError, match=message) as refused:
            hf.load_model(place)
        assert "\n" not in str(refused.value)


def test_a_damaged_dense_model_is_refused_in_one_line(tmp_path: Path) -> None:
    s3.save_pretrained(tiny("llama"), tmp_path, dense=True)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(s3.ModelError, match="cannot load a model") as refused:
        hf.load_model(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_model_without_a_tokenizer_is_refused_in_one_line(saved: Path) -> None:
    with pytest.raises(s3.CheckpointError, match="has no tokenizer") as refused:
        hf.load_model(saved)
    assert "\n" not in str(refused.value)


def test_a_device_that_is_not_there_is_one_line(saved: Path) -> None:
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(s3.ModelError, match="cannot move the model") as refused:
        s3.from_pretrained(saved, device)
    assert "\n" not in str(refused.value)
