"""LoRA through peft on compressed weights: what is trained is what is merged, and masks stay."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import s3tensor as s3
from s3tensor.model.linear import CompressedLinear


def test_without_peft_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 's3tensor\[peft\]'"):
        s3.lora_config(r=4)


peft = pytest.importorskip("peft")
PATTERNS = ("2:4", "rowpair16")


class Net(nn.Module):
    def __init__(self, pattern: str = "2:4", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.out = nn.Linear(32, 8)  # stays dense
        self.to(dtype)
        for layer in (self.up, self.down):
            s3.sparsify_(layer, pattern)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(nn.functional.gelu(self.up(x))))


def adapted(net: nn.Module, seed: int = 1, **options: Any) -> Any:
    """A model with adapters that are not zero."""
    chosen = {"r": 4, "target_modules": ["up", "down", "out"]} | options
    model = peft.get_peft_model(net, s3.lora_config(**chosen))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def layer_of(model: Any, name: str) -> Any:
    return getattr(model.base_model.model, name)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_forward_is_that_of_the_weight_with_the_masked_update(pattern: str) -> None:
    net = Net(pattern)
    x = torch.randn(5, 32)
    model = adapted(net)
    for name in ("up", "down"):
        layer = layer_of(model, name)
        weight = layer.base_layer.weight
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        update = update * layer.scaling["default"] * weight.mask()
        z = torch.randn(3, layer.in_features)
        expected = nn.functional.linear(z, weight.to_dense() + update, layer.base_layer.bias)
        torch.testing.assert_close(layer(z), expected)
    assert type(layer_of(model, "out")).__name__ == "Linear"  # peft's own, for a dense weight
    with model.disable_adapter():
        assert torch.equal(model(x), Net(pattern)(x))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_keeps_mask_and_outputs_bit_for_bit(pattern: str, dtype: torch.dtype) -> None:
    model = adapted(Net(pattern, dtype), target_modules=["up", "down"])
    x = torch.randn(5, 32, dtype=dtype)
    before = model(x)
    masks = [layer_of(model, name).base_layer.weight.mask() for name in ("up", "down")]
    old = layer_of(model, "up").base_layer.weight.to_dense()
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), before)
    for name, mask in zip(("up", "down"), masks, strict=True):
        layer = getattr(merged, name)
        assert type(layer) is CompressedLinear and isinstance(
            layer.weight, s3.StructuredSparseTensor
        )
        assert torch.equal(layer.weight.mask(), mask)
        assert s3.satisfies(layer.weight.to_dense(), pattern)
    assert not torch.equal(merged.up.weight.to_dense(), old)


def test_unmerging_gives_the_weights_back_up_to_rounding() -> None:
    model = adapted(Net())
    x = torch.randn(5, 32)
    before, old = model(x), layer_of(model, "up").base_layer.weight.to_dense()
    model.merge_adapter()
    torch.testing.assert_close(model(x), before)
    with model.disable_adapter():  # peft unmerges for it
        torch.testing.assert_close(model(x), Net()(x))
    torch.testing.assert_close(layer_of(model, "up").base_layer.weight.to_dense(), old)
    torch.testing.assert_close(model(x), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer_of(model, "up").unmerge()


def test_gradients_are_those_of_the_masked_update() -> None:
    model = adapted(Net(), target_modules=["up"]).train()
    layer = layer_of(model, "up")
    x = torch.randn(5, 32, requires_grad=True)
    layer(x).square().sum().backward()
    a, b = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
    found = x.grad, a.grad, b.grad
    wide = [each.detach().double().requires_grad_() for each in (x, a, b)]
    weight = layer.base_layer.weight
    update = (wide[2] @ wide[1]) * layer.scaling["default"] * weight.mask()
    bias = layer.base_layer.bias.double()
    nn.functional.linear(
        wide[0], weight.to_dense().double() + update, bias
    ).square().sum().backward()
    for got, expected in zip(found, wide, strict=True):
        torch.testing.assert_close(got.double(), expected.grad, rtol=1e-4, atol=1e-4)
    assert not weight.requires_grad


def test_training_lowers_the_loss_and_a_saved_adapter_comes_back(tmp_path: Path) -> None:
    net = Net()
    model = adapted(copy.deepcopy(net), lora_dropout=0.1).train()
    x = torch.randn(64, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model(x) - x[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    config = s3.lora_config(peft.LoraConfig.from_pretrained(tmp_path))
    again = peft.PeftModel.from_pretrained(net, tmp_path, config=config).eval()
    assert torch.equal(again(x), model.eval()(x))


def test_autocast_and_compile_and_the_transposed_weights_of_gpt2() -> None:
    model = adapted(Net(), target_modules=["up", "down"])
    x = torch.randn(5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    net = nn.Sequential(conv1d(16, 32))
    s3.sparsify_(net, "2:4")
    model = adapted(net, target_modules=["0"], fan_in_fan_out=True)
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight
    update = layer.get_delta_weight("default") * weight.mask()
    expected = x @ (weight.to_dense() + update) + layer.base_layer.bias
    before = model(x)
    torch.testing.assert_close(before, expected)
    assert torch.equal(model.merge_and_unload()(x), before)


def test_two_adapters_add_up_and_switch() -> None:
    model = adapted(Net(), target_modules=["up", "down"])
    model.add_adapter("second", s3.lora_config(r=2, target_modules=["up"]))
    with torch.no_grad():
        layer_of(model, "up").lora_B["second"].weight.normal_(0, 0.1)
    x = torch.randn(5, 32)
    first = model(x)
    model.base_model.set_adapter(["default", "second"])
    both = model(x)
    assert not torch.equal(first, both)
    assert torch.equal(copy.deepcopy(model).merge_and_unload()(x), both)
    model.base_model.set_adapter(["default"])
    assert torch.equal(model(x), first)


def test_what_needs_a_dense_weight_is_refused_by_name() -> None:
    for options, word in (
        ({"use_dora": True}, "use_dora is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' on a compressed weight"),
    ):
        config = s3.lora_config(r=4, target_modules=["up"], **options)
        with pytest.raises(ValueError, match=word):
            peft.get_peft_model(Net(), config)
    with pytest.raises(TypeError, match="not both"):
        s3.lora_config(peft.LoraConfig(), r=4)
    model = adapted(Net(), target_modules=["up"])
    with pytest.raises(ValueError, match="batches of their own"):
        layer_of(model, "up")(torch.randn(2, 32), adapter_names=["default", "__base__"])
    with torch.no_grad():
        layer_of(model, "up").lora_B["default"].weight.fill_(float("inf"))
    old = layer_of(model, "up").base_layer.weight.to_dense()
    with pytest.raises(ValueError, match="merged with default hold NaN or Inf"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(layer_of(model, "up").base_layer.weight.to_dense(), old)


def test_peft_alone_runs_on_compressed_weights_and_its_merge_says_why_not() -> None:
    config = peft.LoraConfig(r=4, target_modules=["up"])
    model = peft.get_peft_model(Net(), config)
    x = torch.randn(5, 32)
    assert torch.equal(model(x), Net()(x))  # B is zero
    with pytest.raises(s3.UnsupportedOpError, match=r"aten\.add_"):
        model.merge_and_unload()


def test_adapters_train_over_int8_values_which_stay_as_they_are() -> None:
    net = Net()
    s3.quantize_(net)
    before = net.up.weight.detach().to_dense()  # type: ignore[operator]
    model = peft.get_peft_model(net, s3.lora_config(r=4, target_modules=["up", "out"]))
    x, y = torch.randn(64, 32), torch.randn(64, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    layer = layer_of(model, "up")
    assert isinstance(layer.base_layer.weight, s3.Int8SparseTensor)
    assert torch.equal(layer.base_layer.weight.to_dense(), before)
    weight = before + layer.get_delta_weight("default")
    expected = nn.functional.linear(x, weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(s3.UnsupportedOpError, match="Int8SparseTensor"):
        model.merge_and_unload()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_saved_adapter_loads_the_ordinary_way_to_the_same_outputs(
    pattern: str, tmp_path: Path
) -> None:
    x = torch.randn(5, 32)
    model = adapted(Net(pattern))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(pattern), tmp_path)
    assert torch.equal(again.eval()(x), model(x))
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert config.masked_patterns == [pattern] and isinstance(config, peft.LoraConfig)
    injected = Net(pattern)
    peft.inject_adapter_in_model(config, injected)
    assert type(injected.up).__name__ == "SparseLoraLinear"
    second = adapted(Net(pattern), seed=2)
    second.load_adapter(tmp_path, "first")
    second.set_adapter("first")
    assert torch.equal(second.eval()(x), model(x))
    assert pickle.loads(pickle.dumps(config)).masked_patterns == [pattern]
    again.save_pretrained(tmp_path / "again")  # the mark stays
    assert peft.LoraConfig.from_pretrained(tmp_path / "again").masked_patterns == [pattern]


@pytest.mark.parametrize("first", ["s3tensor", "peft"])
def test_a_program_that_never_names_lora_config_loads_a_masked_adapter(
    first: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16))
    s3.sparsify_(net, "2:4")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = adapted(net, target_modules=["0"])
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model(torch.ones(1, 16)), tmp_path / "output.pt")
    second = "peft" if first == "s3tensor" else "s3tensor"
    code = f"""
import {first}, {second}, torch, peft
net = torch.nn.Sequential(torch.nn.Linear(16, 16))
net.load_state_dict(torch.load({str(tmp_path / "net.pt")!r}, weights_only=True), assign=True)
model = peft.PeftModel.from_pretrained(net, {str(tmp_path / "adapter")!r}).eval()
print(torch.equal(model(torch.ones(1, 16)), torch.load({str(tmp_path / "output.pt")!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


def test_a_masked_adapter_is_refused_where_peft_would_change_pruned_weights(tmp_path: Path) -> None:
    adapted(Net()).save_pretrained(tmp_path)
    dense, whole = Net(), Net()
    for layer in (dense.up, dense.down):
        layer.weight = nn.Parameter(layer.weight.to_dense())  # type: ignore[operator]
    s3.quantize_(whole)
    for net in (dense, whole):
        with pytest.raises(s3.ModelError, match=r"trained under the masks of .* 2:4"):
            peft.PeftModel.from_pretrained(net, tmp_path)


def test_an_adapter_without_masks_is_saved_and_loaded_as_by_peft_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"])).save_pretrained(tmp_path)
    dense = nn.Sequential(nn.Linear(8, 8))
    config = s3.lora_config(target_modules=["0"])
    peft.get_peft_model(dense, config).save_pretrained(tmp_path / "dense")
    for folder in (tmp_path, tmp_path / "dense"):
        assert "masked" not in (folder / "adapter_config.json").read_text()
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert type(layer_of(again, "up")).__name__ == "Linear"
    again.save_pretrained(tmp_path / "again")
    assert "masked" not in (tmp_path / "again" / "adapter_config.json").read_text()
    assert pickle.loads(pickle.dumps(again.peft_config["default"])).r == 8


# Models that have adapters before they are pruned -------------------------------------------------------


def adapted_llama(kind: str = "LoraConfig") -> Any:
    """A small Llama with adapters of peft beside some linears of its blocks."""
    from tiny_models import tiny

    random = {"init_lora_weights": False} if kind == "LoraConfig" else {"init_weights": False}
    config = getattr(peft, kind)(r=4, target_modules=["q_proj", "up_proj", "down_proj"], **random)
    return peft.get_peft_model(tiny("llama"), config).eval()


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" in name or "hada_" in name
    }


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig"])
def test_pruning_a_model_with_adapters_leaves_them_as_they_are_and_says_so(
    kind: str, compress: bool
) -> None:
    from tiny_models import token_ids

    model = adapted_llama(kind)
    before = dense_weights(model)
    with pytest.warns(UserWarning, match="merge_and_unload"):
        report = s3.llm.prune_model(
            model, [token_ids()], "2:4", compress=compress, recover=2, progress=False
        )
    after = dense_weights(model)
    assert before
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    names = {row.name.rpartition("layers.0.")[2] for row in report.linears}
    assert {"mlp.up_proj.base_layer", "mlp.gate_proj"} <= names
    assert not any("lora_" in row.name for row in report.linears)
    reasons = {reason for name, reason in report.skipped if "lora_A" in name or "hada_" in name}
    assert reasons == {"part of an adapter of peft, which stays dense"}
    weight = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert s3.satisfies(weight.to_dense() if compress else weight, "2:4")
    assert torch.isfinite(model(input_ids=token_ids()).logits).all()


def test_what_changes_all_linears_of_a_model_leaves_adapters_out() -> None:
    for act in (s3.sparsify_, s3.sparsify_training_):
        model = adapted_llama()
        before = dense_weights(model)
        done = {row.name: (row.action, row.reason) for row in act(model, "2:4")}
        of_adapters = {made for name, made in done.items() if "lora_" in name}
        assert of_adapters == {("skipped", "part of an adapter of peft, which stays dense")}
        assert all(torch.equal(x, before[name]) for name, x in dense_weights(model).items())
        bases = [made for name, made in done.items() if name.endswith("base_layer")]
        assert bases
        assert all(action != "skipped" for action, _ in bases)
