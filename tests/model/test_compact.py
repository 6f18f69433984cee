"""A compacted model is the masked one, smaller: outputs, configurations, and what cannot be cut."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import ModelError
from s3tensor.model.compact import units

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("Llama", {}),
    "llama, tied, biases": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {}),
    "phi3": ("Phi3", {}),
}
TOKENS = torch.arange(18).reshape(2, 9) % 61 + 3


def build(name: str = "llama", **changes: Any) -> nn.Module:
    family, extra = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **extra, **changes})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # norms and biases that are not ones and zeros
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.2)
    return model


def masked(model: nn.Module, **densities: float) -> nn.Module:
    """The model with each unit's weakest blocks at zero, nothing cut: what compact must reproduce."""
    model = copy.deepcopy(model)
    scopes = [
        (unit.scope(), max(1, int(density * unit.count + 0.5)))
        for kind, density in densities.items()
        for unit in units(model, kind)
    ]
    chosen = [scope.get_masks(nnz=keep) for scope, keep in scopes]
    for (scope, _), masks in zip(scopes, chosen, strict=True):
        for spec, mask in masks.items():
            assert spec in list(scope.blocks())
            spec.set_data(spec.data * mask)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def assert_same(one: Tensor, other: Tensor) -> None:
    assert float((one - other).norm() / other.norm()) < 1e-5


CASES = [
    (name, densities)
    for name in MODELS
    for densities in (
        {"channels": 0.75},
        {"heads": 2 / 3},
        {"channels": 0.5, "heads": 1 / 3},
        {"hidden": 0.75},
        {"channels": 0.5, "heads": 2 / 3, "hidden": 0.5},
    )
    if name != "phi3" or set(densities) == {"channels"}
]


@pytest.mark.parametrize(("name", "densities"), CASES)
def test_a_compacted_model_is_the_masked_one(
    name: str, densities: dict[str, float], tmp_path
) -> None:
    model = build(name)
    expected = logits(masked(model, **densities))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name != "qwen3" or "hidden" not in densities else "ignore")
        report = s3.compact(model, **densities)
    assert_same(logits(model), expected)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.parameters_after < report.parameters_before
    for cut in report.cuts:
        density = densities.get(cut.kind, 1.0)
        assert cut.after == max(1, int(density * cut.before + 0.5))
    if name == "qwen3" and "hidden" in densities:
        assert "eps" in report.problem  # its heads have norms of the same eps
        return
    model.save_pretrained(tmp_path)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(model))
    assert sum(p.numel() for p in reloaded.parameters()) == report.parameters_after
    ids = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert torch.equal(ids, reloaded.generate(TOKENS, max_new_tokens=4, do_sample=False))


def test_the_configuration_states_the_new_sizes() -> None:
    model = build()
    s3.compact(model, channels=0.75, heads=2 / 3)
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads) == (30, 4)
    assert (config.num_key_value_heads, config.head_dim) == (2, 8)
    layer = model.model.layers[0]
    assert layer.mlp.gate_proj.out_features == layer.mlp.down_proj.in_features == 30
    assert layer.self_attn.q_proj.out_features == 32 and layer.self_attn.k_proj.out_features == 16
    assert layer.mlp.intermediate_size == 30
    s3.compact(model, hidden=2 / 3)
    assert model.config.hidden_size == 32 and model.config.head_dim == 8
    assert model.config.rms_norm_eps == pytest.approx(1e-6 * 48 / 32)


@settings(max_examples=40)
@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=2, max_size=2), st.data())
def test_what_is_zero_leaves_and_nothing_else(dead: list[list[bool]], data: st.DataObject) -> None:
    model = build(intermediate_size=8)
    side = data.draw(st.sampled_from(("all", "up and its bias", "down")))
    for layer, gone in zip(model.model.layers, dead, strict=True):
        out = torch.tensor(gone)
        with torch.no_grad():
            if side in ("all", "up and its bias"):
                layer.mlp.up_proj.weight[out] = 0.0
            if side in ("all", "down"):
                layer.mlp.down_proj.weight[:, out] = 0.0
    expected = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = s3.compact(model)
    assert_same(logits(model), expected)
    left = {cut.name: cut.after for cut in report.cuts if cut.kind == "channels"}
    for number, gone in enumerate(dead):
        assert left[f"model.layers.{number}.mlp"] == max(1, gone.count(False))


def test_layers_of_several_sizes_run_and_say_that_no_configuration_fits() -> None:
    model = build()
    for number, unit in enumerate(units(model, "channels")):
        unit.scope().hard_threshold(nnz=20 + 5 * number)
    expected, config = logits(model), model.config.to_dict()
    padded = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"different numbers of channels.*20.*25.*uniform=True"):
        report = s3.compact(model)
    assert not report.uniform and "torch.save" in str(report)
    assert_same(logits(model), expected)
    assert [cut.after for cut in report.cuts if cut.kind == "channels"] == [20, 25]
    assert model.config.to_dict() == config
    report = s3.compact(padded, uniform=True)
    assert report.uniform and padded.config.intermediate_size == 25
    assert_same(logits(padded), expected)


def test_a_configuration_that_refuses_the_sizes_is_left_and_named() -> None:
    model = build(hidden_size=48, num_attention_heads=6, num_key_value_heads=6, head_dim=8)
    config = model.config.to_dict()
    expected = logits(masked(model, heads=5 / 6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = s3.compact(model, heads=5 / 6)
    if report.uniform:  # a release of transformers that checks no such sizes
        assert model.config.num_attention_heads == 5 and not caught
    else:
        assert "LlamaConfig refuses" in report.problem and "multiple" in report.problem
        assert str(caught[-1].message) == report.problem
        assert model.config.to_dict() == config
    assert_same(logits(model), expected)


def test_scores_decide_in_place_of_norms() -> None:
    model = build()
    name = units(model, "channels")[0].name
    wanted = torch.arange(40) % 2
    row = model.get_submodule(name).gate_proj.weight.detach()[1::2].clone()
    s3.compact(model, channels=0.5, scores={name: wanted.float()})
    assert torch.equal(model.get_submodule(name).gate_proj.weight.detach(), row)
    with pytest.raises(ModelError, match="one for each of its 20 channels"):
        s3.compact(model, channels=0.5, scores={name: torch.ones(3)})


def test_any_module_of_these_parts_can_be_compacted() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.sigmoid(self.fc1(x)))

    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), Block()), torch.randn(4, 6)
    with torch.no_grad():  # sigmoid(0) is not 0: only what nobody reads may leave
        model[0].fc1.weight[0] = 0.0
        model[0].fc1.bias[0] = 0.0
        model[1].fc2.weight[:, :3] = 0.0
    expected = model(x)
    report = s3.compact(model)
    assert [cut.after for cut in report.cuts] == [10, 7] and report.uniform
    torch.testing.assert_close(model(x), expected)
    model[0].fc1.weight.requires_grad_(False)
    s3.compact(model, channels=0.5)
    assert model[0].fc1.out_features == 5 and not model[0].fc1.weight.requires_grad


def test_a_unit_with_nothing_left_keeps_one_block() -> None:
    model = build()
    for unit in (*units(model, "channels"), *units(model, "heads")):
        unit.scope().hard_threshold(nnz=0)
    expected = logits(model)
    report = s3.compact(model)
    assert {cut.after for cut in report.cuts} == {1}
    assert_same(logits(model), expected)


def test_what_cannot_be_cut_is_refused_and_left_as_it_was() -> None:
    def compressed(model: nn.Module) -> None:
        s3.sparsify_(model, "2:4")

    def parametrized(model: nn.Module) -> None:
        linear = model.model.layers[1].mlp.up_proj
        nn.utils.parametrize.register_parametrization(linear, "weight", s3.S3Sparse("2:4"))

    def shared(model: nn.Module) -> None:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    for change, message in (
        (compressed, "dense weights"),
        (parametrized, "parametrized"),
        (shared, "one parameter"),
    ):
        model = build()
        change(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ModelError, match=message):
            s3.compact(model, channels=0.5)
        after = model.state_dict()
        for name, value in before.items():
            assert value.shape == after[name].shape
    model = build()
    for options, message in (
        ({"channels": 0.0}, "density"),
        ({"heads": 1.5}, "density"),
    ):
        with pytest.raises(ModelError, match=message):
            s3.compact(model, **options)
    with pytest.raises(ModelError, match="neither"):
        s3.compact(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="no heads"):
        s3.compact(build("phi3"), heads=0.5)
    with pytest.raises(ModelError, match="not known"):
        s3.compact(build("phi3"), hidden=0.5)
    with pytest.raises(ModelError, match="channels, heads, hidden"):
        units(model, "rows")  # type: ignore[arg-type]


def test_a_residual_stream_with_layer_norms_is_refused() -> None:
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=48, ffn_dim=40, num_hidden_layers=1, num_attention_heads=6
    )
    model = transformers.OPTForCausalLM(config)
    with pytest.raises(ModelError):
        s3.compact(model, hidden=0.5)


MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
UNKNOWN = (  # a class of config, its options, what is cut, what the error names
    ("GemmaConfig", {"head_dim": 8}, "hidden", "GemmaRMSNorm"),  # multiplies by 1 + weight
    ("Gemma2Config", {"head_dim": 8}, "hidden", "Gemma2RMSNorm"),
    ("OlmoConfig", {}, "hidden", "OlmoLayerNorm"),  # without parameters
    ("MixtralConfig", MOE, "hidden", "gate.weight"),
    ("Olmo2Config", {}, "heads", "q_norm.weight"),  # over all heads
    ("Olmo3Config", {}, "heads", "q_norm.weight"),
    ("OlmoeConfig", {}, "heads", "q_norm.weight"),
    ("CohereConfig", {"use_qk_norm": True}, "heads", "q_norm.weight"),  # a row for each head
    ("DiffLlamaConfig", {"num_key_value_heads": 2}, "heads", "lambda_q1"),  # heads in pairs
    ("GptOssConfig", {"head_dim": 8, **MOE}, "heads", "sinks"),
    ("BitNetConfig", {}, "heads", "attn_sub_norm.weight"),
    ("BitNetConfig", {}, "channels", "ffn_sub_norm.weight"),
)


def causal_lm(name: str, **options: Any) -> nn.Module:
    config = getattr(transformers, name)(**{**SIZES, **options})
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def facts(model: nn.Module) -> dict[str, Any]:
    """All that compact could change: parameters by identity and value, and plain attributes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found |= {
            f"{path}.{name}": value
            for name, value in vars(module).items()
            if isinstance(value, (int, float, tuple))
        }
    for name, parameter in model.named_parameters():
        found[name] = (id(parameter), parameter.detach().numpy().tobytes())
    config = getattr(model, "config", None)
    return {**found, "config": config and config.to_dict()}


@pytest.mark.parametrize(("name", "options", "kind", "part"), UNKNOWN)
def test_parts_not_known_are_refused_and_the_model_is_left_as_it_was(
    name: str, options: dict[str, Any], kind: str, part: str
) -> None:
    model = causal_lm(name, **options)
    before = facts(model)
    with pytest.raises(ModelError, match=part):
        s3.compact(model, **{kind: 0.5})
    assert facts(model) == before


def test_units_with_parts_not_known_are_in_the_way_only_where_they_would_be_cut() -> None:
    model = causal_lm("Olmo2Config")
    expected = logits(masked(model, channels=0.5))
    report = s3.compact(model, channels=0.5)
    assert {(c.before, c.after) for c in report.cuts if c.kind == "heads"} == {(3, 3)}
    assert_same(logits(model), expected)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:8] = 0.0
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_norm"):
        s3.compact(model)


@pytest.mark.parametrize("name", ["Olmo2Config", "BitNetConfig"])
def test_a_norm_inside_an_attention_is_not_one_of_the_residual_stream(name: str) -> None:
    model = causal_lm(name, num_key_value_heads=6)  # its norms have the stream's size
    expected = logits(masked(model, hidden=0.75))
    with pytest.warns(UserWarning, match="eps"):
        s3.compact(model, hidden=0.75)
    assert_same(logits(model), expected)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("StableLmConfig", {}, "heads"),  # its configuration takes no head_dim
        ("HeliumConfig", {"head_dim": 8}, "hidden"),  # another class ignores what is set
        ("Llama4TextConfig", {"head_dim": 8, **MOE}, "channels"),  # two sizes of MLPs
    ],
)
def test_uniform_is_what_the_class_builds_from_the_configuration(
    name: str, options: dict[str, Any], kind: str, tmp_path
) -> None:
    model = causal_lm(name, **options)
    config = model.config.to_dict()
    expected = logits(masked(model, **{kind: 2 / 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = s3.compact(model, **{kind: 2 / 3})
    assert_same(logits(model), expected)
    if report.uniform:
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert_same(logits(again), expected)
    else:
        assert "cannot describe" in report.problem and model.config.to_dict() == config


class Mixing(nn.Module):
    """An MLP whose activation mixes channels: what is zero still changes the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.softmax(self.fc1(x), -1))


def test_a_forward_that_gives_other_outputs_is_refused_and_undone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Mixing(), Mixing()).train()
    before = facts(model)
    with pytest.raises(
        ModelError, match=r"outputs of 0 change by .* channels.*nothing was changed"
    ):
        s3.compact(model, channels=0.5)
    assert facts(model) == before and model.training

    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return output.__class__(logits=output.logits * self.config.hidden_size**0.5)

    class Fixed(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            self.model.layers[0].mlp.up_proj.weight.view(40, -1)
            return output

    for kind, other, message in (
        (Scaled, {"hidden": 0.75}, "outputs change"),
        (Fixed, {"channels": 0.7}, "fails"),
    ):
        model = kind(transformers.LlamaConfig(**SIZES))
        before = facts(model)
        with pytest.raises(ModelError, match=message):
            s3.compact(model, heads=2 / 3, **other)
        assert facts(model) == before


def test_the_norm_of_torch_states_its_size() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(11, 8), nn.RMSNorm(8, eps=1e-6)
            self.lm_head = nn.Linear(8, 11, bias=False)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.lm_head(self.norm(self.embed(input_ids)))

    torch.manual_seed(0)
    model = Norms()
    with torch.no_grad():
        model.embed.weight[:, ::2] = 0.0
        expected = model(TOKENS % 11)
        s3.compact(model, hidden=1.0)
        assert model.norm.normalized_shape == (4,)
        assert_same(model(TOKENS % 11), expected)


def test_a_model_that_returns_its_residual_stream_returns_what_is_left_of_it() -> None:
    model = build().model
    wide = model(input_ids=TOKENS).last_hidden_state
    s3.compact(model, hidden=0.75)
    assert model(input_ids=TOKENS).last_hidden_state.shape[-1] == 36 < wide.shape[-1]
