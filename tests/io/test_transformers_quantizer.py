"""Compressed models in transformers: what s3tensor saves, from_pretrained loads, and the other way round."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from limits import little_memory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import s3tensor as s3
from s3tensor.io import folder, registration
from s3tensor.io import pretrained as hf
from s3tensor.io.state import METADATA_KEY, save_state
from s3tensor.tensor import ops

transformers = pytest.importorskip("transformers")

from tiny_models import FAMILIES, logits, pruned, tiny, token_ids  # noqa: E402 - needs transformers

from s3tensor.io import transformers_quantizer as quantizer  # noqa: E402 - needs transformers

load = transformers.AutoModelForCausalLM.from_pretrained


def sparse(model: nn.Module) -> dict[str, s3.StructuredSparseTensor]:
    named = model.named_parameters()
    return {n: p for n, p in named if isinstance(p, s3.StructuredSparseTensor)}


def stored(place: Path) -> dict[str, bytes]:
    """Dtype, shape and bytes of every tensor in a folder's files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in place.glob("*.safetensors"):
        tensors.update(load_file(file))
    return {
        name: f"{part.dtype} {tuple(part.shape)} ".encode()
        + part.flatten().view(torch.uint8).numpy().tobytes()
        for name, part in tensors.items()
    }


# registration ---------------------------------------------------------------------------------------

OLD_TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 7)
FINDS = "from transformers import AutoModelForCausalLM\n"
ORDERS = {
    "s3tensor first": f"import s3tensor\n{FINDS}",
    "transformers first": f"{FINDS}import s3tensor\n",
    "its models first": f"import transformers.modeling_utils\nimport s3tensor\n{FINDS}",
    "a bare transformers first": f"import transformers\nimport s3tensor\n{FINDS}",
    "the quantizer itself": f"import s3tensor.io.transformers_quantizer\n{FINDS}",
    "a part of s3tensor, reloaded": (
        "import importlib\nfrom s3tensor.pattern.layout import Layout\nimport s3tensor\n"
        f"importlib.reload(s3tensor)\n{FINDS}"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_knows_the_method_in_whatever_order_the_two_are_imported(
    saved: Path, order: str
) -> None:
    code = "import sys, warnings; warnings.simplefilter('error', UserWarning)\n" + ORDERS[order]
    if order.endswith("first"):
        code += f"model = AutoModelForCausalLM.from_pretrained({str(saved)!r})\n"
        code += "kinds = [type(p).__name__ for p in model.parameters()]\n"
        code += "assert kinds.count('StructuredSparseTensor') == 14\n"
    code += (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "from s3tensor.io.registration import _Watch\n"
        "print('s3' in table, any(isinstance(f, _Watch) and f.module[:5] != 'peft' for f in sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]


def test_importing_s3tensor_imports_neither_transformers_nor_torch() -> None:
    code = "import sys, s3tensor; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_transformers_that_does_not_take_the_method_is_warned_of_and_works_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "s3tensor.io.transformers_quantizer", None)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="cannot register with transformers"):
        registration.watch()


def test_an_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported while transformers is, it may hold the module that the lazy one then replaces.
    monkeypatch.setattr(quantizer.transformers, "__version__", "4.40.1")
    monkeypatch.setattr(quantizer.auto, "AUTO_QUANTIZER_MAPPING", {})
    with pytest.raises(s3.ModelError, match=r"transformers 4\.40\.1 is too old"):
        quantizer.register()


def test_registering_again_does_nothing() -> None:
    before = dict(quantizer.auto.AUTO_QUANTIZER_MAPPING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.watch()
        quantizer.register()
    assert before == quantizer.auto.AUTO_QUANTIZER_MAPPING
    assert before["s3"] is quantizer.S3Quantizer


# loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_loads_what_was_saved_to_the_same_logits(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = pruned(kind, dtype)
    s3.save_pretrained(model, tmp_path)
    found, info = load(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(found), logits(model))
    assert found.dtype == dtype
    assert sparse(found).keys() == sparse(model).keys() != set()
    assert not any(weight.requires_grad for weight in sparse(found).values())
    for name, weight in sparse(found).items():
        assert weight.same_layout(model.get_parameter(name))
        assert str(weight.pattern) == "2:4"


@pytest.mark.parametrize("pattern", ["coupled2:4", "rowpair16", "block:4x4@0.5", "4:8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_pattern_loads(tmp_path: Path, kind: str, pattern: str) -> None:
    model = pruned(kind, pattern=pattern)
    s3.save_pretrained(model, tmp_path)
    found = load(tmp_path)
    assert torch.equal(logits(found), logits(model))
    assert {str(weight.pattern) for weight in sparse(found).values()} == {pattern}


def test_loading_makes_no_dense_copy_of_a_compressed_weight(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> Any:
        raise AssertionError("unpacked while loading")

    expected = pruned("llama")
    seen: list[int] = []
    whole = quantizer.S3Quantizer._process_model_after_weight_loading

    def counted(self: Any, model: nn.Module, **kwargs: Any) -> nn.Module:
        seen.append(sum(p.numel() * p.element_size() for p in model.parameters()))
        return whole(self, model, **kwargs)

    monkeypatch.setattr(quantizer.S3Quantizer, "_process_model_after_weight_loading", counted)
    monkeypatch.setattr(ops, "unpack", refused)
    monkeypatch.setattr(s3.StructuredSparseTensor, "to_dense", refused)
    found = load(saved)
    assert sparse(found).keys() == sparse(expected).keys()
    # What transformers placed and filled is to the byte what the compressed model holds.
    assert seen == [hf.weight_bytes(found)[0]]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_dtype_casts_values_and_leaves_indices(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    model = pruned(kind)
    s3.save_pretrained(model, tmp_path)
    found = load(tmp_path, dtype=dtype)
    assert {p.dtype for p in found.parameters()} == {dtype}
    for name, weight in sparse(found).items():
        original = model.get_parameter(name)
        assert torch.equal(weight.packed, original.packed.to(dtype))
        assert torch.equal(weight.indices, original.indices)


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}, torch.device("cpu")], ids=str)
def test_a_device_map_places_compressed_weights(saved: Path, place: Any) -> None:
    found = load(saved, device_map=place)
    assert {weight.device.type for weight in sparse(found).values()} == {"cpu"}
    assert torch.equal(logits(found), logits(pruned("llama")))


def test_a_model_on_the_meta_device_has_its_compressed_weights_without_values(saved: Path) -> None:
    found = load(saved, device_map="meta")
    weights = sparse(found)
    assert len(weights) == 14
    assert all(weight.is_meta and weight.packed.is_meta for weight in weights.values())
    assert hf.weight_bytes(found) == hf.weight_bytes(pruned("llama"))
    ids = token_ids().to("meta")
    with torch.no_grad():
        try:
            tiny("llama").to("meta")(input_ids=ids)
        except (
            RuntimeError
        ):  # transformers 5.0 asks torch whether autocast is on there, for a dense model too
            return
        assert found(input_ids=ids).logits.is_meta


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["2:4", "rowpair16", "4:8"])
@pytest.mark.parametrize("place", ["cuda", "auto", {"": 0}], ids=str)
def test_a_device_map_loads_straight_to_a_gpu(tmp_path: Path, place: Any, pattern: str) -> None:
    model = pruned("llama", torch.bfloat16, pattern)
    s3.save_pretrained(model, tmp_path)
    found = load(tmp_path, dtype="auto", device_map=place)
    for name, weight in sparse(found).items():
        assert weight.is_cuda
        assert torch.equal(weight.to_dense().cpu(), model.get_parameter(name).to_dense())
    with torch.no_grad():
        got = found(input_ids=token_ids().cuda()).logits.cpu()
    torch.testing.assert_close(got, logits(model), rtol=3e-2, atol=3e-2)
    found.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(
        tmp_path
    )  # in canonical order, whatever the device's


@pytest.mark.gpu
def test_loading_to_a_gpu_takes_the_bytes_of_the_compressed_model(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, vocab_size=512
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    s3.sparsify_(model, "2:4")
    s3.save_pretrained(model, tmp_path)
    stored_bytes, dense_bytes = hf.weight_bytes(model)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = load(tmp_path, dtype="auto", device_map="cuda")
    peak = torch.cuda.max_memory_allocated() - before
    largest = 3 * 1024 * 4096 * 2  # one weight and what reorders it
    assert len(sparse(found)) == 28
    assert peak < stored_bytes + largest < dense_bytes


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_over_two_gpus_runs(tmp_path: Path) -> None:
    model = pruned("llama", torch.bfloat16)
    s3.save_pretrained(model, tmp_path)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    found = load(tmp_path, dtype="auto", device_map=places)
    assert {weight.device.index for weight in sparse(found).values()} == {0, 1}
    with torch.no_grad():
        got = found(input_ids=token_ids().cuda(0)).logits.cpu()
    torch.testing.assert_close(got, logits(model), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("rest", ["disk", "cpu"])
def test_offloading_is_refused_by_name(saved: Path, tmp_path: Path, rest: str) -> None:
    places = {"model.layers.1": rest, "": "cpu" if rest == "disk" else "meta"}
    with pytest.raises(s3.ModelError, match="cannot be offloaded"):
        load(saved, device_map=places, offload_folder=tmp_path)


def test_tied_embeddings_are_tied_again(tmp_path: Path) -> None:
    s3.save_pretrained(pruned("llama, tied"), tmp_path)
    found = load(tmp_path)
    assert found.lm_head.weight is found.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_body_loads_without_its_head_and_a_model_from_a_body(tmp_path: Path, kind: str) -> None:
    model = pruned(kind)
    s3.save_pretrained(model, tmp_path / "model")
    body = transformers.AutoModel.from_pretrained(tmp_path / "model")
    assert len(sparse(body)) == len(sparse(model))
    with torch.no_grad():
        hidden = body(input_ids=token_ids()).last_hidden_state
        expected = model.base_model(input_ids=token_ids()).last_hidden_state
    assert torch.equal(hidden, expected)
    body.save_pretrained(tmp_path / "body")
    whole = load(tmp_path / "body")
    with torch.no_grad():
        assert torch.equal(whole.base_model(input_ids=token_ids()).last_hidden_state, expected)


def test_s3_loads_what_transformers_wrote_and_saves_it_again(tmp_path: Path, saved: Path) -> None:
    load(saved).save_pretrained(tmp_path / "a")
    again = s3.from_pretrained(tmp_path / "a")
    assert torch.equal(logits(again), logits(pruned("llama")))
    again.save_pretrained(tmp_path / "b")
    assert stored(tmp_path / "b") == stored(saved)


# what a loaded model does ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_loaded_model_generates_what_the_pruned_one_does(tmp_path: Path, kind: str) -> None:
    model = pruned(kind)
    s3.save_pretrained(model, tmp_path)
    how = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6}
    expected = model.generate(token_ids(5), **how)
    assert torch.equal(load(tmp_path).generate(token_ids(5), **how), expected)


def test_a_pipeline_runs_on_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["[UNK]", "sparse", "weights", "run"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[UNK]")
    s3.save_pretrained(pruned("llama"), tmp_path, tokenizer)
    pipe = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert len(sparse(pipe.model)) == 14
    (found,) = pipe("sparse weights", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("sparse weights")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_forward_compiles_to_one_graph(tmp_path: Path, kind: str) -> None:
    if OLD_TORCH and kind == "llama":
        pytest.skip("torch before 2.7 breaks the graph in a decorator of transformers 5.0's Llama")
    s3.save_pretrained(pruned(kind), tmp_path)
    found = load(tmp_path)
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = compiled(input_ids=token_ids(), use_cache=False).logits
    torch.testing.assert_close(got, logits(found), rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_the_compressed_weights(saved: Path) -> None:
    found = load(saved).train()
    found(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert found.model.embed_tokens.weight.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in sparse(found).values())


def test_a_loaded_model_may_be_cast(saved: Path) -> None:
    found = load(saved).to(torch.bfloat16)
    assert {weight.dtype for weight in sparse(found).values()} == {torch.bfloat16}
    assert load(saved).half().dtype == torch.float16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dequantize_makes_a_plain_dense_model(tmp_path: Path, kind: str) -> None:
    model = pruned(kind)
    s3.save_pretrained(model, tmp_path / "a")
    found = load(tmp_path / "a").dequantize()
    assert not sparse(found)
    for name, weight in sparse(model).items():
        assert torch.equal(found.get_parameter(name), weight.to_dense())
    found.save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not any(name.endswith(".packed") for name in stored(tmp_path / "dense"))
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(model))


def test_dequantize_keeps_shared_weights_shared(saved: Path) -> None:
    found = load(saved)
    first, second = (found.model.layers[i].mlp for i in range(2))
    second.up_proj.weight = first.up_proj.weight
    found.dequantize()
    assert first.up_proj.weight is second.up_proj.weight
    assert first.up_proj.weight is not first.gate_proj.weight


def test_a_loaded_model_is_exported_dense_and_stays_compressed(saved: Path, tmp_path: Path) -> None:
    found = load(saved)
    s3.save_pretrained(found, tmp_path / "dense", dense=True)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    plain = load(tmp_path / "dense")
    assert not sparse(plain)
    torch.testing.assert_close(logits(plain), logits(found))
    assert len(sparse(found)) == 14
    found.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(saved)


def test_saving_leaves_the_config_as_it_was(tmp_path: Path) -> None:
    model = pruned("llama")
    before = model.config.to_dict()
    s3.save_pretrained(model, tmp_path / "a")
    s3.save_pretrained(model, tmp_path / "b", dense=True)
    assert model.config.to_dict() == before
    assert not hasattr(model, "hf_quantizer")


# saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_save_pretrained_writes_the_same_weights_again(tmp_path: Path, kind: str) -> None:
    s3.save_pretrained(pruned(kind, torch.bfloat16), tmp_path / "a")
    load(tmp_path / "a", dtype="auto").save_pretrained(tmp_path / "b")
    assert stored(tmp_path / "a") == stored(tmp_path / "b")
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert s3.verify(tmp_path / "a") == s3.verify(tmp_path / "b") != []


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        s3.save_pretrained(pruned("gpt2"), tmp_path / name, max_shard_size=20_000)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"
    ]
    assert contents[0] == contents[1] == contents[2]


def with_biases(kind: str) -> nn.Module:
    """A small pruned model whose sparse weights have biases beside them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(
            **sizes, intermediate_size=64, attention_bias=True, mlp_bias=True
        ),
        "gpt2": lambda: transformers.GPT2Config(**sizes),
        "opt": lambda: transformers.OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32),
    }[kind]()
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    s3.sparsify_(model, "2:4")
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_model_that_transformers_loaded_gives_the_same_bytes_again(
    tmp_path: Path, kind: str
) -> None:
    model = with_biases(kind)
    s3.save_pretrained(model, tmp_path / "a", max_shard_size=10_000)
    found = load(tmp_path / "a", dtype="auto")
    assert list(found.state_dict()) == list(model.state_dict())
    assert any(name.endswith(".bias") for name in found.state_dict())
    s3.save_pretrained(found, tmp_path / "b", max_shard_size=10_000)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]


def test_several_sparse_weights_of_one_module_keep_their_places(tmp_path: Path) -> None:
    class Three(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
        config_class = transformers.GPT2Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.a = nn.Parameter(torch.ones(4, 8))
            self.b = nn.Parameter(torch.ones(4, 8))
            self.c = nn.Parameter(torch.ones(4, 8))
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None: ...

    model = Three(transformers.GPT2Config(n_layer=1))
    weight = s3.StructuredSparseTensor.from_dense(torch.ones(4, 8), "2:4")
    entry = {"definitions": {"2:4": "2:4"}, "patterns": {"b": "2:4", "a": "2:4"}}
    loader = quantizer.S3Quantizer(quantizer.S3Config(**entry))
    loader._process_model_before_weight_loading(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name in "ab":
            getattr(model, name).indices.copy_(weight.indices)
    loader._process_model_after_weight_loading(model)
    assert list(model.state_dict()) == ["a", "b", "c"]


@pytest.mark.parametrize("writer", ["s3tensor", "transformers"])
@pytest.mark.parametrize("size", ["3KB", "20KB", "1MB", 10_000])
def test_a_model_in_shards_loads_both_ways(
    saved: Path, tmp_path: Path, writer: str, size: int | str
) -> None:
    if writer == "s3tensor":
        start = s3.save_pretrained(pruned("llama"), tmp_path, max_shard_size=size)
        assert start.name == (folder.WEIGHTS if size == "1MB" else folder.INDEX)
    else:
        load(saved).save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size != "1MB")
    assert stored(tmp_path) == stored(saved)
    assert torch.equal(logits(load(tmp_path)), logits(pruned("llama")))
    assert torch.equal(logits(s3.from_pretrained(tmp_path)), logits(pruned("llama")))
    assert s3.verify(tmp_path) == s3.verify(saved)


@pytest.mark.parametrize("size", ["nonsense", "", "5XB"])
def test_a_size_of_shards_that_is_none_is_refused(tmp_path: Path, size: str) -> None:
    with pytest.raises(s3.CheckpointError, match="max_shard_size"):
        s3.save_pretrained(pruned("llama"), tmp_path, max_shard_size=size)


def test_saving_over_a_model_leaves_no_file_of_it(saved: Path, tmp_path: Path) -> None:
    sizes: list[int | str] = [5_000, "1MB", 20_000]
    for size in sizes:
        s3.save_pretrained(pruned("llama"), tmp_path, max_shard_size=size, overwrite=True)
        assert stored(tmp_path) == stored(saved)
        assert (tmp_path / folder.INDEX).is_file() == (size != "1MB")
    s3.save_pretrained(pruned("llama"), tmp_path, dense=True, overwrite=True)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]


def test_a_change_after_loading_is_saved(saved: Path, tmp_path: Path) -> None:
    found = load(saved)
    layer = found.model.layers[0].mlp.up_proj
    dense = layer.weight.to_dense()
    layer.weight = nn.Parameter(
        s3.StructuredSparseTensor.from_dense(dense, "1:4"), requires_grad=False
    )
    found.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert str(again.model.layers[0].mlp.up_proj.weight.pattern) == "1:4"
    assert torch.equal(logits(again), logits(found))


def test_weights_that_transformers_would_rename_are_not_saved_under_false_checksums(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = pytest.importorskip("transformers.core_model_loading")
    found = load(saved)

    def renamed(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {f"old.{name}": value for name, value in state.items()}

    monkeypatch.setattr(loading, "revert_weight_conversion", renamed)
    with pytest.raises(s3.ModelError, match=r"save the model with s3tensor\.save_pretrained"):
        found.save_pretrained(tmp_path)


def test_a_dense_model_is_not_pruned_on_the_way(tmp_path: Path) -> None:
    s3.save_pretrained(tiny("llama"), tmp_path, dense=True)
    with pytest.raises(s3.ModelError, match="pruned already"):
        load(tmp_path, quantization_config=quantizer.S3Config())


def test_folders_of_earlier_versions_load(tmp_path: Path) -> None:
    model = pruned("llama")
    model.config.save_pretrained(tmp_path)
    save_state(tmp_path / folder.OLD_WEIGHTS, folder.unshared_state(model))
    assert torch.equal(logits(s3.from_pretrained(tmp_path)), logits(model))
    assert len(s3.verify(tmp_path)) == 14
    s3.save_pretrained(model, tmp_path, overwrite=True)
    assert not (tmp_path / folder.OLD_WEIGHTS).exists()
    assert torch.equal(logits(load(tmp_path)), logits(model))


# strangers' folders ---------------------------------------------------------------------------------


def entry_with(place: Path, **change: Any) -> None:
    path = place / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))


NAME = "model.layers.0.mlp.up_proj.weight"
HOSTILE: dict[str, dict[str, Any]] = {
    "format": {"format": 2},
    "format of a bool": {"format": True},
    "no format": {"format": None},
    "patterns in a list": {"patterns": [NAME]},
    "a pattern that is a number": {"patterns": {NAME: 24}},
    "definitions in a list": {"definitions": ["2:4"]},
    "a definition that is a list": {"definitions": {"2:4": ["2:4"]}},
    "no definition": {"definitions": {}},
    "nonsense": {"definitions": {"2:4": "nonsense"}},
    "another pattern": {"definitions": {"2:4": "1:4"}},
    "a pattern of the same sizes": {"definitions": {"2:4": "coupled2:4"}},
    "digits": {"definitions": {"2:4": "9" * 5000 + ":" + "9" * 5000}},
    "many keeps": {"definitions": {"2:4": "block=1,1; scope=1,4; keep=2" + "; keep=2" * 9999}},
    "infinity": {"definitions": {"2:4": "block=1,1; scope=1,4; keep=1e999"}},
    "a view of nothing": {
        "definitions": {
            "2:4": "view=m (t h p) -> m t p h; sizes=h:0,p:8; block=1,1,1,2; scope=1,1,4,1; keep=2"
        }
    },
    "brackets": {"definitions": {"2:4": "view=" + "(" * 900}},
    "transposed in a string": {"transposed": "all"},
    "transposed numbers": {"transposed": [1, 2]},
    "transposed": {"transposed": ["model.layers.0.self_attn.k_proj.weight"]},
    "another model": {"patterns": {"transformer.h.0.attn.c_attn.weight": "2:4"}},
    "a dunder": {"patterns": {"__class__.__init__": "2:4"}},
    "the embedding": {"patterns": {"model.embed_tokens.weight": "2:4"}},
    "a norm": {"patterns": {"model.norm.weight": "2:4"}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_config_is_refused_before_memory_is_taken(copy: Path, case: str) -> None:
    entry_with(copy, **HOSTILE[case])
    with little_memory(), pytest.raises(s3.CheckpointError) as refused:
        load(copy)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 2000


def test_a_weight_that_is_named_twice_is_refused(copy: Path) -> None:
    short = NAME.removeprefix("model.")
    entry = json.loads((copy / "config.json").read_text())["quantization_config"]
    entry_with(copy, patterns={**entry["patterns"], short: entry["patterns"][NAME]})
    with pytest.raises(s3.CheckpointError, match=f"names {NAME} twice"):
        load(copy)


@pytest.mark.parametrize("kept", [13, 1, 0], ids=lambda kept: f"{kept} of 14")
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_a_sparse_weight_that_the_config_leaves_out_is_refused_by_name(
    copy: Path, kept: int, kind: str
) -> None:
    patterns = json.loads((copy / "config.json").read_text())["quantization_config"]["patterns"]
    lost = set(sorted(patterns)[kept:])
    entry_with(copy, patterns={n: label for n, label in patterns.items() if n not in lost})
    with pytest.raises(s3.CheckpointError, match="no pattern for") as refused:
        getattr(transformers, kind).from_pretrained(copy)
    assert min(lost) in str(refused.value) and "get config.json again" in str(refused.value)
    assert len(s3.verify(copy)) == 14


def test_what_a_user_s_code_shares_is_stored_under_each_name(tmp_path: Path) -> None:
    model = pruned("llama")
    first, second = (model.model.layers[i] for i in range(2))
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.input_layernorm.weight = first.input_layernorm.weight
    s3.save_pretrained(model, tmp_path / "a")
    s3.save_pretrained(model, tmp_path / "dense", dense=True)
    for found in (
        load(tmp_path / "a"),
        s3.from_pretrained(tmp_path / "a"),
        load(tmp_path / "dense"),
    ):
        assert torch.allclose(logits(found), logits(model), atol=1e-5)
        for name in ("mlp.up_proj.weight", "input_layernorm.weight"):
            twin = found.model.layers[1].get_parameter(name)
            assert torch.equal(twin, found.model.layers[0].get_parameter(name))


def test_a_sparse_weight_that_is_tied_is_refused(tmp_path: Path) -> None:
    s3.save_pretrained(pruned("llama, tied"), tmp_path)
    entry_with(tmp_path, patterns={"model.embed_tokens.weight": "2:4"})
    with pytest.raises(s3.CheckpointError, match="tied"):
        load(tmp_path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
NAMES = st.sampled_from([NAME, "lm_head.weight", "model.norm.weight", "", "model", "x.y", "."])
LABELS = st.sampled_from(["2:4", "1:4", "pair4:8", "rowpair16", "unstructured@0.5", "0:4", ""])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    patterns=VALUES | st.dictionaries(NAMES, LABELS, max_size=3),
    definitions=VALUES | st.dictionaries(LABELS, LABELS | st.text(max_size=30), max_size=3),
    transposed=VALUES | st.lists(NAMES, max_size=3),
    int8=st.none() | VALUES | st.lists(NAMES, max_size=3),
    whole=st.booleans(),
)
@example(
    patterns={"": "1:4"}, definitions={}, transposed=[], int8=None, whole=True
)  # of a weight that is not there, as a head may be
def test_any_config_is_refused_in_our_words_or_loads_what_the_files_hold(
    saved: Path, patterns: Any, definitions: Any, transposed: Any, int8: Any, whole: bool
) -> None:
    right = json.loads((saved / "config.json").read_text())["quantization_config"]
    if whole and isinstance(patterns, dict) and isinstance(definitions, dict):
        patterns = {**right["patterns"], **patterns}
        definitions = {**right["definitions"], **definitions}
    fields = {"patterns": patterns, "definitions": definitions, "transposed": transposed}
    fields["int8"] = int8
    config = transformers.AutoConfig.from_pretrained(saved)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    try:
        loader = quantizer.S3Quantizer(quantizer.S3Config(**fields))
        loader._process_model_before_weight_loading(model, [str(saved / folder.WEIGHTS)])
    except s3.CheckpointError:
        event("refused")
    else:
        event("loaded")
        assert {name for name, *_ in loader._loading} == set(right["patterns"])
        assert all(definitions[patterns[name]] for name in right["patterns"])


def rewrite(place: Path, change: Any) -> None:
    path = place / folder.WEIGHTS
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def damaged_index(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{NAME}.indices"][5] = 0  # twice the first of four


DAMAGES = {
    "no packed values": lambda t: t.pop(f"{NAME}.packed"),
    "no indices": lambda t: t.pop(f"{NAME}.indices"),
    "values of another shape": lambda t: t.update({f"{NAME}.packed": torch.ones(2, 2)}),
    "values that are no numbers": lambda t: t.update(
        {f"{NAME}.packed": t[f"{NAME}.packed"].to(torch.uint8)}
    ),
    "indices of another length": lambda t: t.update(
        {f"{NAME}.indices": t[f"{NAME}.indices"][:-1].clone()}
    ),
    "indices that are numbers": lambda t: t.update(
        {f"{NAME}.indices": t[f"{NAME}.indices"].float()}
    ),
    "indices of no mask": damaged_index,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(copy: Path, damage: str) -> None:
    rewrite(copy, DAMAGES[damage])
    with pytest.raises(s3.CheckpointError) as refused:
        load(copy)
    assert NAME in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(s3.CheckpointError):
        s3.from_pretrained(copy)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(copy: Path, share: float) -> None:
    data = (copy / folder.WEIGHTS).read_bytes()
    (copy / folder.WEIGHTS).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(s3.CheckpointError, match="truncated or altered"):
        load(copy)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    s3.save_pretrained(pruned("llama"), tmp_path / "shards", max_shard_size=20_000)
    return tmp_path / "shards"


@pytest.mark.parametrize(
    "place",
    ["../model-00001-of-00001.safetensors", "/etc/passwd", "other.safetensors", 3, None, ""],
    ids=repr,
)
def test_an_index_that_leads_elsewhere_is_refused(shards: Path, place: Any) -> None:
    index = json.loads((shards / folder.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = place
    (shards / folder.INDEX).write_text(json.dumps(index))
    for read in (s3.from_pretrained, s3.verify):
        with pytest.raises(s3.CheckpointError, match="not the name of a shard"):
            read(shards)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(shards: Path, text: str) -> None:
    (shards / folder.INDEX).write_text(text)
    with pytest.raises(s3.CheckpointError):
        s3.verify(shards)


def test_shards_that_are_missing_altered_or_of_another_model_are_refused(
    shards: Path, tmp_path: Path
) -> None:
    first = min(shards.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    first.write_bytes(data)
    with pytest.raises(s3.CheckpointError, match="checksum"):
        s3.verify(shards)
    s3.save_pretrained(pruned("llama", pattern="1:4"), tmp_path / "x", max_shard_size=20_000)
    shutil.copy(min((tmp_path / "x").glob("*.safetensors")), first)
    with pytest.raises(s3.CheckpointError):
        s3.verify(shards)
    first.unlink()
    with pytest.raises(s3.CheckpointError, match="does not exist"):
        s3.verify(shards)


def test_metadata_says_that_the_file_is_of_torch_and_holds_the_checksums(saved: Path) -> None:
    with safe_open(saved / folder.WEIGHTS, "pt") as file:
        assert file.metadata().keys() == {"format", METADATA_KEY}
        assert file.metadata()["format"] == "pt"


# the card -------------------------------------------------------------------------------------------

FIGURES = {
    "model": "some/model",
    "pruner": "admm",
    "dense_perplexity": 17.71234,
    "pruned_perplexity": 21.5,
    "calibration": {"source": "c4", "samples": 128},
    "command": "s3tensor prune some/model\n --pattern 2:4",
    "seconds": 3.0,
    "evaluation": None,
}


def test_a_card_says_what_is_known_and_how_to_load(tmp_path: Path) -> None:
    s3.save_pretrained(pruned("llama"), tmp_path, card=FIGURES)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for line in (
        "| Pruned from | some/model |",
        "| Pattern | 2:4 (14 weights) |",
        "| Perplexity before | 17.71 |",
        "| Calibration | source c4, samples 128 |",
        "    s3tensor prune some/model --pattern 2:4",
        "    import s3tensor",
    ):
        assert line in text.splitlines(), line
    assert "seconds" not in text
    assert "Evaluation" not in text


def test_a_card_replaces_its_own_section_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nwords\n")
    for pruner in ("wanda", "admm"):
        s3.save_pretrained(pruned("llama"), tmp_path, card={"pruner": pruner}, overwrite=True)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Mine\n\nwords\n")
    assert text.count("## Structured sparsity") == 1
    assert "wanda" not in text
    s3.save_pretrained(pruned("llama"), tmp_path, overwrite=True)
    assert (tmp_path / "README.md").read_text() == text


def test_a_card_of_a_dense_export_has_no_words_on_loading(tmp_path: Path) -> None:
    model = load_dense(tmp_path)
    s3.save_pretrained(model, tmp_path / "b", dense=True, card={"pattern": "a | b"})
    text = (tmp_path / "b" / "README.md").read_text()
    assert "| Pattern | a \\| b |" in text
    assert "import s3tensor" not in text


def load_dense(place: Path) -> nn.Module:
    s3.save_pretrained(pruned("llama"), place / "a", dense=True)
    return load(place / "a")
