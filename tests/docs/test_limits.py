"""The tables of limits in docs/limits.md: each row is tried, and ends as it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import nn

import s3tensor as s3

PAGE = Path(__file__).resolve().parents[2] / "docs" / "limits.md"
TRIED = (
    "A compressed weight as a tensor",
    "What can be compressed",
    "Pruning",
    "Training",
)


def rows() -> dict[str, str]:
    """What happens, by what you do, from the tables that are tried."""
    found: dict[str, str] = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if section.split("\n", 1)[0] in TRIED:
            table = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
            found.update(dict(table[1:]))  # the first row is the head
    return found


def dense() -> torch.Tensor:
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(0))


def weight() -> s3.StructuredSparseTensor:
    return s3.StructuredSparseTensor.from_dense(dense(), "2:4")


def compress(tensor: torch.Tensor, *mask: torch.Tensor) -> Any:
    return s3.StructuredSparseTensor.from_dense(tensor, "2:4", *mask)


def x(rows: int = 3) -> torch.Tensor:
    return torch.ones(rows, 32)


def trained() -> nn.Parameter:
    """A compressed parameter with a gradient."""
    parameter = nn.Parameter(weight())
    F.linear(x(), parameter).sum().backward()
    return parameter


def gradient_of_the_gradient() -> None:
    parameter = nn.Parameter(weight())
    loss = F.linear(x(), parameter).square().sum()
    (first,) = torch.autograd.grad(loss, parameter, create_graph=True)
    first.to_dense().sum().backward()


def set_element() -> None:
    weight()[0, 0] = 1.0


def split_block() -> None:
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[:, ::2] = True
    s3.StructuredSparseTensor.from_dense(dense(), "pair4:8", mask)


def relu_compiled() -> None:
    torch.compile(lambda w: torch.relu(w), fullgraph=True)(weight())


def altered_file(folder: Path) -> None:
    from s3tensor.io.state import load_state, save_state

    save_state(folder / "x", {"w": weight()})
    data = bytearray((folder / "x").read_bytes())
    data[-1] ^= 1
    (folder / "x").write_bytes(data)
    load_state(folder / "x")


def llama(blocks: int = 1) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def prune_into(folder: Path) -> None:
    for pattern in ("2:4", "1:4"):
        tokens = [torch.zeros(1, 8, dtype=torch.int64)]
        s3.llm.prune_model(llama(), tokens, pattern, "magnitude", work_dir=folder, progress=False)


def short_text() -> None:
    s3.llm.windows(torch.arange(10), 4, 64, 0)


def load_dense_into_compressed() -> None:
    layer = nn.Linear(32, 16)
    state = layer.state_dict()
    layer.weight = nn.Parameter(weight(), requires_grad=False)
    layer.load_state_dict(state)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.up(hidden).tanh())


class Halves(Plain):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + super().forward(hidden[:, ::2]).mean()


class ByPixels(Plain):
    def forward(self, hidden: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(hidden) + pixels


class LanguageModel(nn.Module):
    def __init__(self, kind: type[nn.Module], between: float = 1.0) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(32, 16), nn.ModuleList(kind() for _ in range(2))
        self.between = between

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden * self.between)
        return hidden


def prune_tokens(model: nn.Module) -> dict[str, str]:
    tokens = torch.arange(32).view(2, 16)
    return dict(s3.llm.prune_model(model, [tokens], "2:4", "magnitude", progress=False).skipped)


def prune_shared() -> None:
    model = LanguageModel(Plain)
    model.head = nn.Linear(16, 32)
    model.head.weight = model.blocks[0].up.weight
    assert "head.weight" in prune_tokens(model)["blocks.0.up"]


def prune_routed() -> None:
    model = LanguageModel(Plain)
    model.blocks[0].router = nn.Linear(16, 2)
    torch_prune.l1_unstructured(model.blocks[1].up, "weight", 0.5)
    skipped = prune_tokens(model)
    assert skipped["blocks.0.router"] == "it is a router"
    assert "by a hook" in skipped["blocks.1.up"]


def load_as_another(folder: Path) -> None:
    pytest.importorskip("transformers")
    from saved_models import saved

    config = saved(folder).joinpath("config.json")
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaModel"))
    s3.load_model(folder)


# Each row: what is done, once or in several ways, each of which must end so.
CASES: dict[str, list[Callable[..., Any]]] = {
    "elementwise operators, `torch.relu(weight)`, `weight * 2`": [
        lambda: torch.relu(weight()), lambda: weight() * 2, lambda: weight() + torch.ones(16, 32),
        lambda: weight() == weight(), lambda: weight().mul_(2),
    ],
    "reductions and norms, `weight.sum()`, `weight.norm()`": [
        lambda: weight().sum(), lambda: weight().norm(), lambda: weight().isnan(),
    ],
    "slices, `cat`, `view`, assignment to elements": [
        lambda: weight()[:4], lambda: torch.cat([weight(), weight()]), lambda: weight().view(-1),
        lambda: weight().reshape(32, 16), set_element,
    ],
    "a product of two compressed weights": [lambda: weight() @ weight().t()],
    "a product with `out=`": [lambda: torch.mm(x(), weight().t(), out=torch.empty(3, 16))],
    "`torch.bmm`, `einsum`, `F.embedding`, `F.conv2d`": [
        lambda: torch.bmm(x()[None], weight().t()[None]),
        lambda: torch.einsum("bi,oi->bo", x(), weight()),
        lambda: F.embedding(torch.tensor([1]), weight()),
        lambda: F.conv2d(torch.ones(1, 32, 4, 4), weight().view(16, 32, 1, 1)),
    ],
    "`vmap` over a compressed weight": [lambda: torch.vmap(lambda row: row @ x().t())(weight())],
    "`.numpy()`": [lambda: weight().numpy()],
    "x whose dtype differs from the weight's": [lambda: F.linear(x().bfloat16(), weight())],
    "a second derivative with respect to the weight": [gradient_of_the_gradient],
    "`torch.func.grad`, `vjp`, `jacrev`, `jvp` by a compressed weight": [
        lambda: torch.func.grad(lambda w: F.linear(x(), w).sum())(weight()),
        lambda: torch.func.vjp(lambda w: F.linear(x(), w), weight()),
        lambda: torch.func.jacrev(lambda w: F.linear(x(), w))(weight()),
        lambda: torch.func.jvp(lambda w: F.linear(x(), w), (weight(),), (weight(),)),
    ],
    "an operator without a rule under `torch.compile(fullgraph=True)`": [relu_compiled],
    "a weight of complex numbers, int8 or fp8": [
        lambda: compress(dense().to(torch.complex64)), lambda: compress(dense().to(torch.int8)),
        lambda: compress(dense().to(torch.float8_e4m3fn)),
    ],
    "a weight that the pattern does not fit": [lambda: compress(torch.ones(16, 30))],
    "a mask that keeps too much, or splits a block": [
        lambda: compress(dense(), torch.ones(16, 32, dtype=torch.bool)), split_block,
    ],
    "a matrix pattern on a weight of three dims": [lambda: compress(torch.ones(2, 16, 32))],
    "NaN or Inf in a weight": [
        lambda: compress(torch.full((16, 32), torch.nan)),
        lambda: compress(torch.full((16, 32), torch.inf)),
    ],
    "int8 values of a dense weight, a float64 weight, or one without exactly two dims": [
        lambda: s3.Int8SparseTensor.from_sparse(dense()),
        lambda: s3.Int8SparseTensor.from_sparse(compress(dense().double())),
        lambda: s3.Int8SparseTensor.from_sparse(
            s3.StructuredSparseTensor.from_dense(torch.ones(8, 4, 3, 3), "filter@0.5")
        ),
    ],
    "a gradient with respect to a weight with int8 values": [
        lambda: nn.Parameter(s3.Int8SparseTensor.from_sparse(weight())),
        lambda: s3.Int8SparseTensor.from_sparse(weight()).requires_grad_(),
    ],
    "embeddings alone, by `sparsify_`": [lambda: s3.sparsify_(nn.Embedding(16, 32), "2:4")],
    "convolutions, by `sparsify_`": [lambda: s3.sparsify_(nn.Conv2d(16, 16, 3), "2:4")],
    "a file that was altered": [altered_file],
    "a pruner that needs a Hessian, without one": [
        lambda: s3.prune.admm(dense(), None, "2:4"), lambda: s3.prune.wanda(dense(), None, "2:4"),
    ],
    "a weight without exactly two dims, given to a pruner": [
        lambda: s3.prune.magnitude(torch.ones(2, 4, 8), None, "2:4")
    ],
    "an unknown pruner": [lambda: s3.prune.get("nonsense")],
    "a model without linears in decoder blocks": [
        lambda: s3.llm.prune_model(
            nn.Linear(32, 16), [torch.zeros(1, 8, dtype=torch.int64)], "2:4", progress=False
        )
    ],
    "a model of images, audio, or an encoder and a decoder": [
        lambda: prune_tokens(LanguageModel(ByPixels)),
    ],
    "blocks that take more from each other than hidden states and a shared container": [
        lambda: prune_tokens(LanguageModel(Plain, between=2.0)),
    ],
    "a model of which no linear can be pruned": [lambda: prune_tokens(LanguageModel(Halves))],
    "a shared weight, some of whose places are not pruned": [prune_shared],
    "routers of experts, and weights that a hook computes": [prune_routed],
    "a folder whose `architectures` have no place for one of its tensors": [load_as_another],
    "calibration text that is too short": [short_text],
    "a `work_dir` of a run with other settings": [prune_into],
    "training a compressed weight by plain SGD": [
        lambda: torch.optim.SGD([trained()], lr=0.1).step()
    ],
    "training a compressed weight by AdamW": [lambda: torch.optim.AdamW([trained()]).step()],
    "`clip_grad_norm_` over gradients of compressed weights": [
        lambda: nn.utils.clip_grad_norm_([trained()], 1.0)
    ],
    "`state_dict` of a dense model into a compressed one": [load_dense_into_compressed],
}  # fmt: skip


def test_every_row_is_tried_and_nothing_else() -> None:
    assert set(CASES) == set(rows())


@pytest.mark.parametrize("row", CASES)
def test_a_row_ends_as_it_says(row: str, tmp_path: Path) -> None:
    what = rows()[row]
    named = re.match(r"`(\w+)`", what)
    for number, case in enumerate(CASES[row]):
        folder = tmp_path / str(number)
        folder.mkdir()
        arguments = (folder,) if case.__code__.co_argcount else ()
        if named is None:
            assert what.startswith("works")
            case(*arguments)
            continue
        with pytest.raises(Exception) as raised:  # its name is in the table
            case(*arguments)
        names = {kind.__name__ for kind in type(raised.value).__mro__}
        assert named.group(1) in names, f"{row}: {raised.type.__name__}: {raised.value}"
        assert str(raised.value).strip(), "an error says something"


def test_sgd_moves_the_kept_values_and_leaves_the_positions() -> None:
    parameter = trained()
    before = parameter.detach().clone()
    torch.optim.SGD([parameter], lr=0.1).step()
    assert not torch.equal(parameter.packed, before.packed)
    assert torch.equal(parameter.indices, before.indices)
