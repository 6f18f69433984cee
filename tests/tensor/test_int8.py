"""``Int8SparseTensor`` and ``quantize_`` on a CPU: errors of rounding, products, stores, refusals."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import s3tensor as s3
from s3tensor.io.folder import unshared_state
from s3tensor.io.pretrained import weight_bytes
from s3tensor.io.state import flatten_state, load_state, save_state, unflatten_state
from s3tensor.tensor.int8_values import DTYPES
from s3tensor.testing import bound_patterns

PATTERNS = (
    *("2:4", "coupled2:4", "pair4:8", "rowpair16", "1:4", "4:8", "3:5"),
    *("block:4x4@0.5", "block:16x16@0.5", "row@0.5", "unstructured@0.3"),
)


def shape_for(pattern: str) -> tuple[int, int]:
    """An odd shape that the pattern divides."""
    steps = [s3.Pattern.parse(pattern).step(dim)[0] for dim in range(2)]
    rows, columns = (step * -(-size // step) for step, size in zip(steps, (19, 45), strict=True))
    return rows, columns


def sparse(
    pattern: str = "2:4", dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0
) -> s3.StructuredSparseTensor:
    generator = torch.Generator().manual_seed(seed)
    dense = scale * torch.randn(shape_for(pattern), generator=generator)
    return s3.StructuredSparseTensor.from_dense(dense.to(dtype), pattern)


def int8(pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> s3.Int8SparseTensor:
    return s3.Int8SparseTensor.from_sparse(sparse(pattern, dtype))


# What is kept -----------------------------------------------------------------------------------------


@given(
    bound_patterns(),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4, 3e37]),
    st.floats(0, 1),
)
def test_no_weight_is_off_by_more_than_half_its_scale(
    bound: Any, dtype: torch.dtype, seed: int, scale: float, zeros: float
) -> None:
    assume(len(bound.shape) == 2)
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(bound.shape, generator=generator) * scale
    dense = dense.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
    dense[torch.rand(bound.shape[0], generator=generator) < zeros] = 0  # whole rows
    weight = s3.StructuredSparseTensor.from_dense(dense, bound.pattern)
    small = s3.Int8SparseTensor.from_sparse(weight)
    exact, found = weight.to_dense().double(), small.to_dense(torch.float64)
    slack = 1e-4  # the quotient is rounded to float32 before it is rounded to an integer
    assert ((found - exact).abs() <= (0.5 + slack) * small.scales.double()[:, None]).all()
    assert torch.equal(small.mask(), weight.mask())
    assert (found[~weight.mask()] == 0).all() and (found[exact == 0] == 0).all()
    for kind in DTYPES:
        if dtype == kind or kind == torch.float32:
            assert small.to_dense(kind).isfinite().all()
    assert int(small.packed.abs().amax()) <= 127
    rows = exact.abs().amax(1)
    assert ((small.scales > 0) == (rows > 0)).all()


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, 1e-45, 3e-39])
def test_the_largest_and_the_smallest_numbers_have_a_scale(value: float) -> None:
    dense = torch.zeros(3, 8)
    dense[1, 2], dense[1, 3], dense[2, 0] = value, -value / 3, 1.0
    small = s3.Int8SparseTensor.from_sparse(s3.StructuredSparseTensor.from_dense(dense, "2:4"))
    found = small.to_dense()
    assert found.isfinite().all() and small.scales.isfinite().all()
    assert ((found - dense).abs() <= 0.5001 * small.scales[:, None]).all()
    assert small.scales[0] == 0 and (small.scales[1:] > 0).all()


def test_nan_in_a_weight_is_refused() -> None:
    weight = sparse()
    weight.packed[3] = float("nan")
    with pytest.raises(s3.NonFiniteError, match="before it is quantized"):
        s3.Int8SparseTensor.from_sparse(weight)


def test_bytes_are_those_of_integers_codes_and_scales() -> None:
    small = s3.Int8SparseTensor.from_sparse(
        s3.StructuredSparseTensor.from_dense(torch.randn(64, 128).bfloat16(), "2:4")
    )
    assert small.nbytes_compressed == sum(part.nbytes for part in small.parts())
    assert small.nbytes_compressed == 64 * 128 // 2 + 64 * 128 // 8 + 64 * 4
    assert (small.shape, small.dtype, small.density) == ((64, 128), torch.bfloat16, 0.5)
    assert repr(small) == (
        "Int8SparseTensor(shape=(64, 128), pattern=2:4, density=0.5, dtype=torch.bfloat16, device='cpu', "
        "bytes=5376 of 16384 dense)"
    )


# Products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_products_are_those_of_the_dequantized_weight(pattern: str, dtype: torch.dtype) -> None:
    weight = int8(pattern, dtype)
    dense = weight.dequantize()
    rows, columns = dense.shape
    assert dense.dtype == dtype
    for lead in ((), (1,), (3,), (2, 3)):
        x, bias = torch.randn(*lead, columns).to(dtype), torch.randn(rows).to(dtype)
        assert torch.equal(F.linear(x, weight), F.linear(x, dense))
        assert torch.equal(F.linear(x, weight, bias), F.linear(x, dense, bias))
        assert torch.equal(x @ weight.t(), F.linear(x, dense))
    back = torch.randn(5, rows).to(dtype)
    exact = back.double() @ dense.double()
    for found in (back @ weight, torch.mm(back, weight), F.linear(back, weight.t())):
        assert (found.double() - exact).norm() <= 1e-2 * exact.norm()
    v = torch.randn(columns).to(dtype)
    assert torch.equal(weight @ v, weight.mv(v)) and (weight @ v).shape == (rows,)
    tall = torch.randn(columns, 4).to(dtype)
    assert (weight @ tall).shape == torch.mm(weight, tall).shape == (rows, 4)
    x = torch.randn(3, columns).to(dtype)
    b = torch.randn(rows).to(dtype)
    assert torch.equal(torch.addmm(b, x, weight.t()), F.linear(x, dense, b))
    assert torch.addmm(b, x, weight.t(), beta=0.5, alpha=2).shape == (3, rows)
    assert F.linear(x[:0], weight, b).shape == (0, rows)


def test_views_are_of_the_same_values() -> None:
    weight = int8("rowpair16")
    assert torch.equal(weight.t().to_dense(), weight.to_dense().t())
    assert torch.equal(weight.t().mask(), weight.mask().t())
    assert weight.t().packed.data_ptr() == weight.packed.data_ptr()
    for same in (weight.t().t(), weight.mT.mT, weight.transpose(0, 1).t(), weight.permute(0, 1)):
        assert torch.equal(same.to_dense(), weight.to_dense())
    transposed = s3.Int8SparseTensor.from_sparse(sparse("rowpair16").t())
    assert torch.equal(transposed.to_dense(), weight.to_dense().t())


def test_gradients_of_x_pass_through() -> None:
    weight, x = int8(), torch.randn(3, 48, requires_grad=True)
    F.linear(x, weight).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    F.linear(again, weight.dequantize()).square().sum().backward()
    assert x.grad is not None and again.grad is not None
    assert torch.allclose(x.grad, again.grad, atol=1e-4)


def test_autocast_computes_in_its_dtype() -> None:
    weight, x = int8(), torch.randn(3, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear(x, weight)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear(x.bfloat16(), weight.dequantize(torch.bfloat16)))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "block:4x4@0.5"])
def test_a_model_compiles_whole(pattern: str) -> None:
    torch.compiler.reset()  # other tests compile the same code, and Dynamo counts
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    s3.sparsify_(model, pattern)
    s3.quantize_(model)
    x = torch.randn(2, 3, 64)
    call = torch.compile(model, fullgraph=True)
    assert torch.allclose(call(x), model(x), atol=1e-5)
    given = x.clone().requires_grad_()
    call(given).sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()


def test_the_operator_passes_torch_s_own_checks() -> None:
    weight = int8()
    parts = weight.packed, weight.indices, weight.scales
    arguments = torch.randn(3, 48), *parts, torch.randn(19), "2:4", [19, 48], False, False
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.s3tensor.linear_int8.default, arguments, test_utils=tests)


# Copies and stores ------------------------------------------------------------------------------------


def test_copies_stay_compressed_and_dtypes_are_those_of_products() -> None:
    weight = int8()
    weight.note = "mine"  # type: ignore[attr-defined]
    for twin in (weight.clone(), weight.detach(), copy.copy(weight), copy.deepcopy(weight)):
        assert isinstance(twin, s3.Int8SparseTensor)
        assert torch.equal(twin.to_dense(), weight.to_dense())
    half = weight.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.scales.dtype == torch.float32
    assert torch.equal(half.to_dense(torch.float32), weight.to_dense())
    assert torch.equal(weight.half().float().to_dense(), weight.to_dense())
    assert weight.to("meta").is_meta and weight.to("meta").shape == weight.shape
    other = s3.Int8SparseTensor.from_sparse(sparse(seed=1))
    assert not torch.equal(other, weight)
    with torch.no_grad():
        other.copy_(weight)
    assert torch.equal(other, weight)
    other.data = int8().data
    assert torch.equal(other, weight)
    assert weight.share_memory_().is_shared()


def model_of(pattern: str = "2:4") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    s3.sparsify_(model, pattern)
    return model


def test_quantize_reports_each_weight_and_keeps_what_is_dense() -> None:
    model = model_of()
    x = torch.randn(3, 64)
    before = model(x)
    report = s3.quantize_(model)
    assert [row.name for row in report.rows] == ["0.weight", "2.weight"]
    assert (report.before, report.after, report.dense) == (5440, 1792, 10240)
    assert all(0 < row.error < 0.02 for row in report.rows)
    assert "2 compressed weights have int8 values" in str(report)
    assert (model(x) - before).norm() < 0.02 * before.norm()
    assert not any(isinstance(p, s3.StructuredSparseTensor) for p in model.parameters())
    with pytest.raises(s3.ModelError, match="no more compressed weights to quantize; it has int8"):
        s3.quantize_(model)
    with pytest.raises(s3.ModelError, match="int8 values, which have no second forms"):
        s3.set_memory_(model, "fast")
    with pytest.raises(s3.ModelError, match=r"to quantize; prune it, or call s3tensor\.sparsify_"):
        s3.quantize_(nn.Linear(4, 4))


def test_quantize_takes_what_the_filter_takes_and_keeps_ties() -> None:
    model = model_of()
    report = s3.quantize_(model, filter_fn=lambda module, name: name == "2")
    assert [row.name for row in report.rows] == ["2.weight"]
    assert isinstance(model[0].weight, s3.StructuredSparseTensor)  # type: ignore[index]
    with pytest.raises(s3.ModelError, match="that filter_fn takes"):
        s3.quantize_(model, filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match='must be "int8"'):
        s3.quantize_(model, "fp8")  # type: ignore[arg-type]
    shared = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    shared[1].weight = shared[0].weight
    s3.sparsify_(shared, "2:4", lambda module, name: True)
    assert len(s3.quantize_(shared).rows) == 1
    assert shared[0].weight is shared[1].weight


def test_quantize_changes_nothing_when_a_weight_is_not_finite() -> None:
    model: Any = model_of()
    model[2].weight.packed[0] = float("inf")
    with pytest.raises(s3.NonFiniteError):
        s3.quantize_(model)
    assert isinstance(model[0].weight, s3.StructuredSparseTensor)


@pytest.mark.parametrize("pattern", ["2:4", "rowpair16", "1:4"])
def test_stores_give_back_the_same_weights(pattern: str, tmp_path: Path) -> None:
    model = model_of(pattern)
    s3.quantize_(model)
    x, state = torch.randn(3, 64), model.state_dict()
    expected = model(x)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=True)
    tensors, description = flatten_state(state, checksums=True)
    assert {"0.weight.packed", "0.weight.indices", "0.weight.scales"} <= set(tensors)
    save_state(tmp_path / "x", state)
    for found in (pickled, unflatten_state(tensors, description), load_state(tmp_path / "x")):
        for assign in (True, False):
            twin = model_of(pattern)
            s3.quantize_(twin)
            twin.load_state_dict(found, assign=assign)
            assert torch.equal(twin(x), expected)
        with torch.device("meta"):
            empty = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        with pytest.raises(RuntimeError, match=r"requires_grad_\(False\) before load_state_dict"):
            empty.load_state_dict(found, assign=True)
        empty.requires_grad_(False).load_state_dict(found, assign=True)
        assert torch.equal(empty(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)


def test_what_is_quantized_counts_as_compressed() -> None:
    model: Any = nn.Sequential(nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(32, 16))
    model[1].weight = model[0].weight
    s3.sparsify_(model, "2:4", lambda module, name: name != "2")
    s3.quantize_(model)
    weight = model[0].weight
    reasons = {row.name: row.reason for row in s3.sparsify_(model, "2:4").rows}
    assert reasons == {"0": "compressed already", "1": "compressed already", "2": ""}
    assert model[0].weight is model[1].weight is weight
    assert s3.finalize(model) is model
    state = unshared_state(model)
    assert "0.weight" in state and "1.weight" not in state
    with pytest.raises(s3.PatternError, match="compressed already"):
        register_parametrization(model[0], "weight", s3.S3Sparse("2:4"))


def stored() -> tuple[dict[str, Tensor], dict[str, Any]]:
    weight = int8()
    names = "packed", "indices", "scales"
    return dict(zip(names, weight.parts(), strict=True)), weight.description()


def altered(**change: Any) -> Any:
    """The rebuilt weight of sound parts with some of them, or of the description, in other words."""
    parts, description = stored()
    for name, value in change.items():
        if name in parts:
            parts[name] = value(parts[name])
        else:
            description[name] = value
    return s3.Int8SparseTensor.from_stored(**parts, description=description)


def at(value: float) -> Any:
    def change(part: Tensor) -> Tensor:
        part = part.clone()
        part.flatten()[0] = value
        return part

    return change


@pytest.mark.parametrize(
    "change",
    [
        {"packed": at(-128)},
        {"packed": lambda p: p[1:]},
        {"packed": lambda p: p.to(torch.float16)},
        {"packed": lambda p: p[:1].expand(p.shape)},
        {"indices": lambda p: p[1:]},
        {"indices": lambda p: torch.zeros_like(p)},
        {"indices": lambda p: p.to(torch.int8)},
        {"scales": at(float("nan"))},
        {"scales": at(float("inf"))},
        {"scales": at(3e38)},
        {"scales": at(-1.0)},
        {"scales": lambda p: p[1:]},
        {"scales": lambda p: p.double()},
        {"scales": lambda p: p[:1].expand(p.shape)},
        {"scales": lambda p: p[:, None]},
        {"shape": [19, 4800000]},
        {"shape": [19]},
        {"shape": "19"},
        {"shape": [2**39, 2**39]},
        {"dtype": "float64"},
        {"dtype": []},
        {"values": "fp8"},
        {"values": None},
        {"pattern": "2:"},
        {"pattern": 7},
        {"transposed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_no_weight_could_have_given_is_refused(change: dict[str, Any]) -> None:
    assert torch.equal(altered(), int8())
    with pytest.raises(s3.CheckpointError):
        altered(**change)


def test_a_pickle_cannot_set_what_is_ours() -> None:
    from s3tensor.tensor.int8 import rebuild_int8

    parts, description = stored()
    for more in ({"packed": 1}, {"to_dense": 1}, [], {3: 1}):
        with pytest.raises(s3.CheckpointError):
            rebuild_int8(*parts.values(), description, more)  # type: ignore[arg-type]
    assert vars(rebuild_int8(*parts.values(), description, {"note": 1}))["note"] == 1


def test_a_state_without_scales_is_refused() -> None:
    tensors, description = flatten_state({"w": int8()})
    del tensors["w.scales"]
    with pytest.raises(s3.CheckpointError, match="a part of it is missing"):
        unflatten_state(tensors, description)


def language_model(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny Llama under 2:4 with int8 values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    s3.sparsify_(model, "2:4", lambda module, name: "_proj" in name and "down" not in name)
    report = s3.quantize_(model)
    s3.sparsify_(model, "rowpair16", lambda module, name: "layers.1.mlp.down" in name)
    now, dense = weight_bytes(model)
    assert now < dense and dense - now > report.dense - report.after
    return model


def bits(place: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    """What each tensor of a folder's files holds."""
    safetensors = pytest.importorskip("safetensors.torch")
    found = {}
    for file in place.glob("*.safetensors"):
        for name, part in safetensors.load_file(file).items():
            found[name] = part.dtype, part.flatten().view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_the_files_of_hugging_face_hold_int8_values(
    tmp_path: Path, dtype: torch.dtype, shards: str
) -> None:
    model, tokens = language_model(dtype), torch.arange(8)[None]
    s3.save_pretrained(model, tmp_path / "a", max_shard_size=shards)
    assert len(s3.verify(tmp_path / "a")) == len(s3.verify(model)) == 13
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    for found in (s3.from_pretrained(tmp_path / "a"), load(tmp_path / "a", dtype="auto")):
        kinds = [type(p).__name__ for p in found.parameters() if type(p) is not nn.Parameter]
        assert kinds.count("Int8SparseTensor") == 12
        assert kinds.count("StructuredSparseTensor") == 1
        up = found.model.layers[0].mlp.up_proj.weight
        assert up.dtype == dtype and up.scales.dtype == torch.float32
        assert torch.equal(found(tokens).logits, model(tokens).logits)
        assert weight_bytes(found) == weight_bytes(model)
        found.save_pretrained(tmp_path / "b", max_shard_size=shards)
        assert bits(tmp_path / "b") == bits(tmp_path / "a")
    other = torch.float16
    cast = load(tmp_path / "a", dtype=other).model.layers[0].mlp.up_proj.weight
    assert cast.dtype == other and torch.equal(cast.scales, up.scales)
    with pytest.raises(s3.ModelError, match="int8 values, whose products are in float32"):
        load(tmp_path / "a", dtype=torch.float64)
    plain = load(tmp_path / "a", dtype="auto").dequantize()
    assert torch.equal(plain.model.layers[0].mlp.up_proj.weight, up.to_dense())


def test_a_dense_export_is_what_the_integers_stand_for(tmp_path: Path) -> None:
    model = language_model()
    s3.save_pretrained(model, tmp_path / "dense", dense=True)
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    name = "model.layers.0.mlp.up_proj.weight"
    plain = load(tmp_path / "dense").state_dict()[name]
    assert type(plain) is Tensor and torch.equal(plain, model.state_dict()[name].to_dense())


def test_a_card_tells_of_int8_values(tmp_path: Path) -> None:
    s3.save_pretrained(language_model(), tmp_path / "a", card={"model": "tiny"})
    text = (tmp_path / "a/README.md").read_text()
    assert "2:4 with int8 values (12 weights), rowpair16 (1 weights)" in text
    assert "The weights are compressed" in text


def test_transposed_weights_with_int8_values_are_stored_and_loaded(tmp_path: Path) -> None:
    tiny_models = pytest.importorskip("tiny_models")
    model = tiny_models.pruned("gpt2")
    report = s3.quantize_(model)
    s3.save_pretrained(model, tmp_path / "a")
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    found = load(tmp_path / "a", dtype="auto")
    named = dict(found.named_parameters())
    assert report.rows and all(named[row.name].transposed for row in report.rows)
    for row in report.rows:
        assert torch.equal(named[row.name], model.get_parameter(row.name))


def test_a_float_weight_takes_no_int8_values(tmp_path: Path) -> None:
    weight, small = sparse(), int8()
    for target, source in ((weight, small), (small, weight)):
        with pytest.raises(s3.UnsupportedOpError, match=r"int8 values copied|same form"):
            target.copy_(source)
    with pytest.raises(RuntimeError, match="requires_grad must be a bool"):
        weight.requires_grad = 1  # type: ignore[assignment]


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda entry: entry.pop("int8"), "differently"),
        (lambda entry: entry["int8"].remove(UP), "differently"),
        (
            lambda entry: entry["int8"].append("model.layers.1.mlp.down_proj.weight"),
            "differently",
        ),
        (lambda entry: entry.update(int8=7), "its tables must be of strings"),
        (lambda entry: entry.update(int8=[7]), "its tables must be of strings"),
        (lambda entry: entry.update(int8={UP: 1}), "its tables must be of strings"),
    ],
)
def test_a_config_that_does_not_fit_the_files_is_refused(
    change: Any, match: str, tmp_path: Path
) -> None:
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    s3.save_pretrained(language_model(), tmp_path / "a")
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(s3.CheckpointError, match=match):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("part", "change", "match"),
    [
        ("scales", None, "is missing"),
        ("scales", lambda t: t[1:].clone(), "a float type of shape"),
        ("scales", lambda t: t.to(torch.int8), "a float type of shape"),
        ("scales", lambda t: -t, "not finite, or negative"),
        ("scales", lambda t: t * float("inf"), "not finite, or negative"),
        ("packed", lambda t: t.float(), "needs I8"),
        ("packed", lambda t: t.view(torch.uint8), "needs I8"),
        ("packed", lambda t: t.to(torch.int16), "needs I8"),
        ("scales", lambda t: t.to(torch.int64), "a float type of shape"),
        ("packed", lambda t: torch.full_like(t, -128), "not of -127 to 127"),
        ("indices", lambda t: t.view(torch.int8), "needs U8"),
        ("indices", torch.zeros_like, "do not describe"),
    ],
)
def test_files_that_no_model_could_have_given_are_refused(
    part: str, change: Any, match: str, tmp_path: Path
) -> None:
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    safetensors = pytest.importorskip("safetensors.torch")
    s3.save_pretrained(language_model(), tmp_path / "a")
    file = tmp_path / "a/model.safetensors"
    tensors = safetensors.load_file(file)
    if change is None:
        del tensors[f"{UP}.{part}"]
    else:
        tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()
    safetensors.save_file(tensors, file, {"format": "pt"})  # of a stranger: no checksums
    with pytest.raises(s3.CheckpointError, match=match):
        load(tmp_path / "a")


# Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "use"),
    [
        ("mul", lambda w: w * 2),
        ("add", lambda w: w + w),
        ("sum", lambda w: w.sum()),
        ("relu", torch.relu),
        ("linalg_vector_norm", lambda w: w.norm()),
        ("slice", lambda w: w[1:]),
        ("select", lambda w: w[0]),
        ("cat", lambda w: torch.cat([w, w])),
        ("view", lambda w: w.view(-1)),
        ("split", lambda w: w.chunk(2)),
        ("fill_", lambda w: w.fill_(0.0)),
        ("embedding", lambda w: F.embedding(torch.tensor([1]), w)),
        ("_to_copy", lambda w: w.double()),
        ("_to_copy", lambda w: w.to(torch.int8)),
        ("copy_", lambda w: torch.empty(w.shape).copy_(w)),
        ("copy_", lambda w: w.copy_(torch.empty(w.shape))),
        ("copy_", lambda w: w.copy_(w.t())),
        ("clone", lambda w: w.t().contiguous()),
        ("as_strided", lambda w: w.as_strided((2, 2), (1, 2))),
        ("matmul", lambda w: w @ w.t()),
        ("out=", lambda w: torch.mm(torch.ones(2, 19), w, out=torch.empty(2, 48))),
        ("linear", lambda w: F.linear(w, w)),
        ("apply_", lambda w: w.apply_(abs)),
        ("Tensor.data", lambda w: setattr(w, "data", torch.empty(w.shape))),
        ("no gradient", nn.Parameter),
        ("no gradient", lambda w: w.requires_grad_()),
        ("no gradient", lambda w: setattr(w, "requires_grad", True)),
    ],
)
def test_what_has_no_rule_is_refused_by_name(what: str, use: Any) -> None:
    weight = int8()
    before = weight.to_dense()
    with (
        pytest.raises((s3.UnsupportedOpError, RuntimeError), match=what) as caught,
        torch.no_grad(),
    ):
        use(weight)
    assert isinstance(caught.value, s3.UnsupportedOpError)
    assert torch.equal(weight.to_dense(), before)


def test_only_compressed_matrices_are_quantized() -> None:
    quantize: Any = s3.Int8SparseTensor.from_sparse
    with pytest.raises(s3.PatternError, match="a Tensor cannot be quantized; compress it first"):
        quantize(torch.randn(4, 8))
    with pytest.raises(s3.PatternError, match=r"torch\.float64 cannot be quantized"):
        quantize(sparse(dtype=torch.float64))
    filters = s3.StructuredSparseTensor.from_dense(torch.randn(8, 4, 3, 3), "filter@0.5")
    with pytest.raises(s3.PatternError, match="for matrices"):
        quantize(filters)
    with pytest.raises(s3.PatternError, match="compressed already"):
        s3.StructuredSparseTensor.from_dense(int8(), "2:4")


@pytest.mark.parametrize(
    ("x", "bias", "match"),
    [
        (
            torch.randn(3, 48).bfloat16(),
            None,
            r"x is torch\.bfloat16 and the weight torch\.float32",
        ),
        (torch.randn(3, 47), None, r"x of shape \(3, 47\) against in_features 48"),
        (torch.randn(3, 48), torch.randn(18), r"bias \(18,\)"),
        (torch.randn(3, 48), torch.randn(19).half(), "float16"),
        (torch.randn(3, 48, device="meta"), None, "move them to one device"),
    ],
)
def test_what_does_not_fit_is_a_runtime_error(x: Tensor, bias: Tensor | None, match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        F.linear(x, int8(), bias)
