"""Hugging Face models in and out: what is saved loads to the same bits, compressed and dense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import little_memory
from safetensors.torch import load_file
from torch import nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.io import folder
from s3tensor.io import pretrained as hf
from s3tensor.tensor import ops

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


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir()}


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


def breaking(monkeypatch: pytest.MonkeyPatch, dense: bool, fault: BaseException, last: int) -> None:
    """Let the writing of weights fail at its file of the number ``last``, which is then half there."""
    module = transformers.modeling_utils if dense else folder
    name = "safe_save_file" if dense else "save_file"
    real, written = getattr(module, name), 0

    def breaks(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        nonlocal written
        written += 1
        if written == last:
            Path(path).write_text("half")
            raise fault
        real(tensors, path, *rest, **named)

    monkeypatch.setattr(module, name, breaks)


FAULTS = [OSError(28, "No space left on device"), KeyboardInterrupt()]
FULL_OR_STOPPED = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)


@FULL_OR_STOPPED
@pytest.mark.parametrize("size", [None, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "compressed"])
@pytest.mark.parametrize("before", [True, False], ids=["over dense", "over compressed"])
def test_a_model_that_cannot_be_replaced_is_left_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bool,
    dense: bool,
    size: int | None,
    fault: BaseException,
) -> None:
    old = pruned("llama")
    s3.save_pretrained(old, tmp_path, dense=before, max_shard_size=size)
    files = contents(tmp_path)
    with monkeypatch.context() as patch:
        breaking(patch, dense, fault, last=2 if size else 1)
        with pytest.raises((s3.CheckpointError, KeyboardInterrupt)) as failed:
            s3.save_pretrained(
                pruned("gpt2"), tmp_path, dense=dense, overwrite=True, max_shard_size=size
            )
    if isinstance(fault, OSError):
        assert "No space left" in str(failed.value) and "free space" in str(failed.value)
    assert contents(tmp_path) == files
    load = transformers.AutoModelForCausalLM.from_pretrained if before else s3.from_pretrained
    torch.testing.assert_close(logits(load(tmp_path).eval()), logits(old), rtol=1e-5, atol=1e-5)


@FULL_OR_STOPPED
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "compressed"])
def test_a_first_save_that_fails_leaves_nothing_in_the_way_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: bool, fault: BaseException
) -> None:
    model = pruned("llama")
    with monkeypatch.context() as patch:
        breaking(patch, dense, fault, last=2)
        with pytest.raises((s3.CheckpointError, KeyboardInterrupt)):
            s3.save_pretrained(model, tmp_path / "model", dense=dense, max_shard_size=20_000)
    assert not list((tmp_path / "model").iterdir())
    s3.save_pretrained(model, tmp_path / "model", dense=dense, max_shard_size=20_000)
    assert (tmp_path / "model" / folder.INDEX).is_file()


def test_what_a_killed_save_left_goes_with_the_next_and_what_another_writes_stays(
    tmp_path: Path,
) -> None:
    pytest.importorskip("fcntl")
    for name in ("left", "held"):
        (tmp_path / f".saving-{name}").mkdir()
        (tmp_path / f".saving-{name}" / hf.WEIGHTS).write_text("half")
    with folder._held(tmp_path / ".saving-held") as held:
        assert held
        s3.save_pretrained(tiny("llama"), tmp_path)
        assert [path.name for path in tmp_path.glob(".*")] == [".saving-held"]
    s3.save_pretrained(tiny("llama"), tmp_path, overwrite=True)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "compressed"])
@pytest.mark.parametrize("size", ["abc", "", "5XB", "0GB", "-1GB", "nanGB", "infGB", 0, -1, [1]])
def test_a_size_of_shards_that_is_none_is_refused_before_anything_is_written(
    tmp_path: Path, size: Any, dense: bool
) -> None:
    with pytest.raises(s3.CheckpointError, match=r"max_shard_size=.* is no size; give bytes above"):
        s3.save_pretrained(tiny("llama"), tmp_path / "new", dense=dense, max_shard_size=size)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "compressed"])
@pytest.mark.parametrize("size", [None, "1 mb", 1_000_000, "0.5GB"])
def test_a_model_below_the_size_of_shards_is_one_file(
    tmp_path: Path, size: Any, dense: bool
) -> None:
    s3.save_pretrained(tiny("llama"), tmp_path, dense=dense, max_shard_size=size)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == [hf.WEIGHTS]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(hf, "_tokenizer", lambda place: None)
    monkeypatch.chdir(tmp_path)
    start = s3.save_pretrained(pruned("llama"), "~/model")
    assert start == tmp_path / "model" / hf.WEIGHTS
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sparse_names(s3.from_pretrained("~/model")) == sparse_names(hf.load_model("~/model")[0])
    assert len(s3.verify("~/model")) == len(s3.verify(Path("~/model"))) == 14
    with pytest.raises(s3.ModelError, match="no model at ~/nothing"):
        hf.load_model("~/nothing")


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


def config_with(place: Path, **change: Any) -> None:
    path = place / "config.json"
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


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", {"head_dim": 2**40}, "does not fit its own config"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than"),
        ("qwen2", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than"),
        ("gpt2", {"n_layer": 10**9}, "n_layer is 1000000000, more than"),
        ("gpt2", {"text_config": {"num_layers": 1e99}}, "num_layers is 1e[+]99, more than"),
        ("gpt2", {"n_positions": 2**40}, "does not fit its own config|cannot be used"),
        ("llama", {"vocab_size": 2**40}, "does not fit its own config"),
    ],
    ids=["head", "layers", "layer types", "n_layer", "nested", "positions", "vocabulary"],
)
def test_sizes_of_a_config_are_compared_with_the_files_before_memory_is_taken(
    tmp_path: Path, kind: str, change: dict[str, Any], message: str
) -> None:
    s3.save_pretrained(pruned(kind), tmp_path)
    config_with(tmp_path, **change)
    with little_memory(), pytest.raises(s3.CheckpointError, match=message) as refused:
        s3.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


def test_buffers_that_no_file_bounds_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(
        n_embd=32, n_layer=1, n_head=4, rotary_dim=8, vocab_size=VOCABULARY, n_positions=64
    )
    s3.save_pretrained(transformers.GPTJForCausalLM(config), tmp_path)
    assert s3.from_pretrained(tmp_path).config.n_positions == 64
    config_with(tmp_path, n_positions=2**40)
    with little_memory(), pytest.raises(s3.CheckpointError, match="35184372088832 bytes that the"):
        s3.from_pretrained(tmp_path)


def other_model(kind: str) -> nn.Module:
    """A small pruned model that is no causal language model."""
    torch.manual_seed(0)
    wide = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = {
        "BertForSequenceClassification": lambda kind: kind(
            transformers.BertConfig(**wide, num_hidden_layers=2, vocab_size=VOCABULARY)
        ),
        "T5ForConditionalGeneration": lambda kind: kind(
            transformers.T5Config(
                d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCABULARY
            )
        ),
        "LlamaModel": lambda kind: kind(
            transformers.LlamaConfig(**wide, num_hidden_layers=2, vocab_size=VOCABULARY)
        ),
    }[kind](getattr(transformers, kind)).eval()
    s3.sparsify_(model, "2:4")
    return model


@pytest.mark.parametrize(
    "kind", ["BertForSequenceClassification", "T5ForConditionalGeneration", "LlamaModel"]
)
def test_a_model_of_any_class_of_transformers_reloads_as_that_class(
    tmp_path: Path, kind: str
) -> None:
    model = other_model(kind)
    s3.save_pretrained(model, tmp_path / "a")
    found = s3.from_pretrained(tmp_path / "a")
    assert type(found) is type(model)
    assert sparse_names(found) == sparse_names(model) != set()
    inputs = {"input_ids": token_ids()}
    if kind.startswith("T5"):
        inputs["decoder_input_ids"] = token_ids(5)
    with torch.no_grad():
        assert torch.equal(found(**inputs)[0], model(**inputs)[0])
    s3.save_pretrained(found, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    "names",
    [
        *(None, [], 5, [5], "LlamaModel", {"a": 1}),
        *(["NoSuchModel"], ["PreTrainedModel"], ["logging"], ["LlamaConfig"], ["BertModel"]),
    ],
    ids=str,
)
def test_without_a_class_of_its_config_a_model_is_a_causal_one(copy: Path, names: Any) -> None:
    config_with(copy, architectures=names)
    assert type(s3.from_pretrained(copy)) is transformers.LlamaForCausalLM


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
    monkeypatch.setattr(hf, "_tokenizer", lambda place: None)
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
        ("./nowhere", r"no model at \./nowhere$"),
        ("../nowhere", r"no model at \.\./nowhere$"),
        ("nowhere/", "no model at nowhere/$"),
        ("~/no-such-folder-of-mine", "no model at ~/no-such-folder-of-mine$"),
        ("./nowhere.gguf", "no GGUF file at nowhere.gguf$"),
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
