"""Which weights of a model are parameters of its linear layers, and which of these are routers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from tiny_models import batches, tiny
from torch import Tensor, nn
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor import llm
from s3tensor.model.weights import computed_by_hook, router_names


def masked(module: nn.Module) -> None:
    torch_prune.l1_unstructured(module, "weight", 0.3)


def normed(module: nn.Module) -> None:
    torch.nn.utils.weight_norm(module)


def spectral(module: nn.Module) -> None:
    torch.nn.utils.spectral_norm(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", [masked, normed, spectral])
class TestAWeightThatAHookComputes:
    """It would be computed again at the next forward: it is left out, with the reason, or refused."""

    def test_is_left_dense_by_prune_model(self, how: Callable[[nn.Module], None]) -> None:
        model = tiny("llama")
        how(model.model.layers[0].mlp.up_proj)
        before = {
            name: x.clone() for name, x in model.model.layers[0].mlp.up_proj.named_parameters()
        }
        report = llm.prune_model(model, batches(), "2:4", "magnitude", progress=False)
        assert "by a hook" in dict(report.skipped)["model.layers.0.mlp.up_proj"]
        assert len(report.linears) == 13
        after = dict(model.model.layers[0].mlp.up_proj.named_parameters())
        assert all(torch.equal(before[name], after[name]) for name in before)
        with torch.no_grad():
            model(input_ids=batches()[0])

    def test_is_skipped_by_sparsify_and_sparsify_training(
        self, how: Callable[[nn.Module], None]
    ) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        how(model[0])
        trained = s3.sparsify_training_(model, "2:4")
        assert [row.action for row in trained] == ["skipped", "parametrized"]
        assert "by a hook" in trained.rows[0].reason
        s3.finalize(model)
        rows = s3.sparsify_(model, "2:4").rows
        assert "by a hook" in rows[0].reason
        assert [row.name for row in s3.quantize_(model)] == ["1.weight"]
        assert model(torch.randn(2, 64)).shape == (2, 64)

    def test_is_refused_by_compact_and_by_registration(
        self, how: Callable[[nn.Module], None]
    ) -> None:
        model = tiny("llama")
        layer = model.model.layers[0].mlp.up_proj
        how(layer)
        with pytest.raises(s3.ModelError, match=r"computed from weight_.* by a hook"):
            s3.compact(model, channels=0.5)
        with pytest.raises(ValueError, match="does not have a parameter"):
            parametrize.register_parametrization(layer, "weight", s3.S3Sparse("2:4"))


def test_a_weight_that_is_a_buffer_is_no_parameter() -> None:
    layer = nn.Linear(8, 8)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    assert computed_by_hook(layer) == "its weight is not a parameter"


# Routers ----------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """As in Qwen2-MoE, Llama 4, JetMoe and others: what routes is an ordinary linear."""

    def __init__(self, **routers: nn.Module) -> None:
        super().__init__()
        for name, router in routers.items():
            setattr(self, name, router)
        self.experts = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(16, 16)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x


class OwnRouter(nn.Linear):
    """A router by its class."""


def test_routers_are_known_by_name_or_class_and_gates_by_the_experts_beside_them() -> None:
    model = nn.ModuleDict(
        {
            "qwen2": Experts(gate=nn.Linear(16, 2), shared_expert_gate=nn.Linear(16, 1)),
            "gemma4": Experts(
                router=nn.ModuleDict({"proj": nn.Linear(16, 2)}),
                per_layer_input_gate=nn.Linear(16, 8),
            ),
            "own": Experts(choose=OwnRouter(16, 2)),
            "rwkv": nn.ModuleDict({"gate": nn.Linear(16, 16), "gate_proj": nn.Linear(16, 16)}),
        }
    )
    assert router_names(model) == {
        "qwen2.gate",
        "qwen2.shared_expert_gate",
        "gemma4.router.proj",
        "own.choose",
    }


def test_routers_stay_dense_unless_a_filter_takes_them() -> None:
    def made() -> nn.Module:
        return nn.ModuleDict({"mlp": Experts(gate=nn.Linear(16, 4))})

    for sparsify in (s3.sparsify_, s3.sparsify_training_):
        rows = {row.name: row.reason for row in sparsify(made(), "2:4")}
        assert rows["mlp.gate"] == "a router"
        assert not rows["mlp.experts.0.gate"]
        rows = {row.name: row.reason for row in sparsify(made(), "2:4", filter_fn=lambda *_: True)}
        assert not rows["mlp.gate"]


transformers = pytest.importorskip("transformers")
_MOE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "options", "routers"),
    [
        (
            "Llama4TextConfig",
            {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 4},
            1,
        ),
        ("PhimoeConfig", {"num_local_experts": 4}, 1),
        (
            "Qwen2MoeConfig",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "shared_expert_intermediate_size": 32,
            },
            1,
        ),
    ],
)
def test_routers_of_transformers_are_left_dense_by_prune_model(
    config: str, options: dict[str, int], routers: int
) -> None:
    kind = getattr(transformers, config, None)
    if kind is None:
        pytest.skip(f"this transformers has no {config}")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**_MOE, **options)).eval()
    before = {
        name: x.clone()
        for name, x in model.named_parameters()
        if "router" in name or "_gate." in name
    }
    report = llm.prune_model(model, batches(), "2:4", "magnitude", progress=False)
    left = [name for name, reason in report.skipped if reason == "it is a router"]
    assert (
        len(left) <= 2 * routers
    )  # of which some versions hold the weight in a class of their own
    assert not [
        row.name for row in report.linears if "router" in row.name or row.name.endswith("_gate")
    ]
    after = dict(model.named_parameters())
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
