"""Ambient modes of torch: every entry gives under each mode what it gives without, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import _lru_cache_wrapper, cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import logits, pruned, tiny, token_ids
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import s3tensor as s3
from s3tensor import prune
from s3tensor.evaluate.compare import compare
from s3tensor.modes import neutral
from s3tensor.tensor.base import Compressed

GENERATOR = torch.Generator().manual_seed(0)
W, X, DENSE = (torch.randn(n, 64, generator=GENERATOR) for n in (32, 300, 300))
H = X.T @ X / 300
MASK = s3.project(W, "2:4")
IDS, COUNT, ONES = token_ids(), torch.arange(99), torch.ones(300)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


@cache
def base(kind: str) -> nn.Module:
    return pruned("llama") if kind == "pruned" else tiny(kind)


def whole(kind: str = "llama", **options: Any) -> Callable[[Path], Any]:
    """A model pruned, and its report."""

    def run(_: Path) -> Any:
        model = copy.deepcopy(base(kind))
        report = s3.llm.prune_model(
            model, [IDS, IDS.flip(0)], "2:4", held_out=[IDS.flip(1)], progress=False, **options
        )
        figures = [(x.error, x.held_out_error, x.alpha, x.damp) for x in report.linears]
        return model, figures, [(x.error, x.loss_before, x.loss_after) for x in report.blocks]

    return run


def hessian(_: Path) -> Any:
    first, second = s3.Hessian(64), s3.Hessian(64)
    for each in (first, second):
        each.update(X, DENSE, ONES)
    first.merge(second)
    return first.value(), first.cross()


def factors(_: Path) -> Any:
    made = s3.Factors(H)
    return made.matrix, made.inverse(), made.solve(W), made.inverse_cholesky()


def compressed(_: Path) -> Any:
    weight = s3.StructuredSparseTensor.from_dense(W, "2:4")
    return weight, s3.StructuredSparseTensor.from_dense(W, "2:4", MASK), weight.to_dense()


def sparsified(_: Path) -> Any:
    model = copy.deepcopy(base("gpt2"))
    return model, str(s3.sparsify_(model, "2:4"))


def trained(_: Path) -> Any:
    model = copy.deepcopy(base("llama"))
    s3.sparsify_training_(model, "2:4", mode="soft")
    s3.step(model)
    s3.freeze(model)
    return s3.finalize(model)


def saved(folder: Path) -> Any:
    """The digest of every file, and what is read back."""
    model = copy.deepcopy(base("pruned"))
    s3.set_memory_(model, "fast")
    s3.save_pretrained(model, folder / "made", overwrite=True)
    files = sorted((folder / "made").iterdir())
    found = s3.from_pretrained(folder / "made")
    digests = [hashlib.sha256(x.read_bytes()).hexdigest() for x in files]
    return digests, s3.verify(found), found, s3.verify(folder / "made")


def quantized(_: Path) -> Any:
    model = copy.deepcopy(base("pruned"))
    return s3.quantize_(model).after, model


def cut(_: Path) -> Any:
    model = copy.deepcopy(base("llama"))
    return s3.compact(model, channels=0.5).parameters_after, model


def parametrized(_: Path) -> Any:
    """A state dict in training, and what another module reads from it."""
    made = []
    for mode in ("ste", "ste", "soft"):
        linear = nn.Linear(64, 32, bias=False, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            linear.weight.copy_(W)
        sparse = s3.S3Sparse("2:4", mode=mode, transposable=mode == "ste")  # type: ignore[arg-type]
        nn.utils.parametrize.register_parametrization(linear, "weight", sparse)
        made.append(linear)
    made[1].load_state_dict(made[0].state_dict())
    return made


def paper(_: Path) -> Any:
    weight = nn.Parameter(W.clone())
    scope = s3.ScopeSpec(s3.BlockSpec(weight, shape=(1, 1)), shape=(1, 4))
    s3.StructuredOBS(scope, H).prune_true_obs(nnz=2)
    return weight


ENTRIES: dict[str, Callable[[Path], Any]] = {
    **{
        name: lambda _, call=call: call(W, H, "2:4")  # type: ignore[misc]
        for name, call in prune.PRUNERS.items()
    },
    "obs of joint blocks": lambda _: prune.obs(W, H, "coupled2:4"),
    "admm with a drift": lambda _: prune.admm(W, H, "2:4", target=H, drift=W),
    "admm of blocks": lambda _: prune.admm(W, H, "block:16x16@0.5"),
    "refit": lambda _: prune.refit(W, H, MASK),
    "Hessian": hessian,
    "compute_hessian": lambda _: s3.compute_hessian(X),
    "output_error": lambda _: s3.output_error(W * MASK, W, H),
    "Factors": factors,
    "project": lambda _: (s3.project(W, "2:4"), s3.satisfies(W, "2:4")),
    "transposable": lambda _: s3.transposable(W, "2:4"),
    "from_dense": compressed,
    "StructuredOBS": paper,
    "prune_model": whole(),
    "prune_model, Conv1D": whole("gpt2"),
    "prune_model, dense": whole(compress=False, pruner="sparsegpt"),
    "prune_model, recover": whole(recover=3),
    "prune_model, mixed": whole(budgets="mixed", pruner="wanda"),
    "prune_model, auto": whole(alpha="auto"),
    "sparsify_": sparsified,
    "finalize": trained,
    "compact": cut,
    "S3Sparse": parametrized,
    "quantize_": quantized,
    "save_pretrained": saved,
    "perplexity": lambda _: s3.perplexity(base("llama"), IDS, 12),
    "compare": lambda _: compare([("a", base("llama")), ("b", base("gpt2"))], IDS),
    "windows": lambda _: s3.llm.windows(COUNT, 3, 8),
}


def content(value: Any) -> Any:
    """What two results are compared by: every bit, dtype and device."""
    if isinstance(value, nn.Module):
        return [(name, content(x)) for name, x in value.state_dict().items()]
    if isinstance(value, Compressed):
        parts = [content(getattr(value, part)) for part in value.__tensor_flatten__()[0]]
        return str(value.pattern), parts
    if isinstance(value, Tensor):
        plain = value.detach().contiguous().flatten().view(torch.uint8)
        return str(value.dtype), tuple(value.shape), str(value.device), bytes(plain.tolist())
    if isinstance(value, (list, tuple)):
        return [content(x) for x in value]
    return value


def forget_caches() -> None:
    """So that what a mode could leave in them shows."""
    classes = ("config_class", "layer_class")  # made once: pickles look for the very class
    for found in gc.get_objects():
        if type(found) is not _lru_cache_wrapper or found.__name__ in classes:
            continue
        if found.__module__.startswith("s3tensor."):
            found.cache_clear()


@cache
def outside(entry: str, folder: Path) -> Any:
    return content(ENTRIES[entry](folder))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for kind in ("gpt2", "llama", "pruned"):
        base(kind)
    return tmp_path_factory.mktemp("modes")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_mode_changes_nothing_and_leaves_nothing_behind(
    entry: str, mode: str, folder: Path
) -> None:
    expected = outside(entry, folder)
    forget_caches()
    with MODES[mode]():
        found = ENTRIES[entry](folder)
    assert content(found) == expected
    assert content(ENTRIES[entry](folder)) == expected


@pytest.mark.parametrize(
    "call",
    [
        *(lambda name=name: prune.PRUNERS[name](W, H, "2:4") for name in prune.PRUNERS),  # type: ignore[misc]
        lambda: prune.refit(W, H, MASK),
        lambda: s3.compute_hessian(X),
        lambda: s3.Hessian(64).update(X),
        lambda: s3.Factors(H),
        lambda: s3.output_error(DENSE, X, H),
        lambda: s3.project(W, "2:4"),
        lambda: s3.satisfies(W, "2:4"),
        lambda: s3.StructuredSparseTensor.from_dense(W, "2:4"),
        lambda: s3.StructuredSparseTensor.from_dense(W, "2:4", MASK),
        lambda: s3.llm.prune_model(base("llama"), [IDS], "2:4", progress=False),
        lambda: s3.sparsify_(base("llama"), "2:4"),
        lambda: s3.quantize_(base("pruned")),
        lambda: s3.save_pretrained(base("pruned"), "nowhere"),
        lambda: s3.verify(base("pruned")),
        lambda: s3.perplexity(base("llama"), IDS, 12),
        lambda: s3.llm.windows(COUNT, 3, 8),
    ],
)
def test_inside_a_fake_tensor_mode_an_entry_says_so(call: Callable[[], Any]) -> None:
    for kind in ("llama", "pruned"):
        base(kind)
    with FakeTensorMode(), pytest.raises(s3.OptionError, match="FakeTensorMode is active"):
        call()


def test_the_modes_of_the_caller_are_back_afterwards_also_after_an_error() -> None:
    def ambient() -> tuple[Any, ...]:
        return (
            torch.is_inference_mode_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_default_dtype(),
            torch.get_default_device(),
        )

    here = ambient()
    with (
        MODES["autocast"](),
        MODES["inference_mode"](),
        MODES["default dtype bfloat16"](),
        MODES["default device"](),
    ):
        before = ambient()
        with contextlib.suppress(ZeroDivisionError), neutral():
            assert ambient() == (False, False, *here[2:])
            with torch.enable_grad(), neutral():
                assert not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert ambient() == before
    assert ambient() == here


def test_the_default_dtype_is_back_once_the_last_thread_has_left() -> None:
    first, second = threading.Event(), threading.Event()

    def late() -> None:
        with neutral():
            first.set()
            assert second.wait(10)
            assert torch.get_default_dtype() == torch.float32

    with default_dtype(torch.bfloat16):
        thread = threading.Thread(target=late)
        thread.start()
        assert first.wait(10)
        with neutral():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # the other thread's
        second.set()
        thread.join()
        assert torch.get_default_dtype() == torch.bfloat16


def test_casts_that_autocast_keeps_are_dropped_where_weights_change() -> None:
    model = copy.deepcopy(base("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        before = model(input_ids=IDS).logits
        s3.llm.prune_model(model, [IDS], "2:4", compress=False, progress=False)
        found = model(input_ids=IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=IDS).logits, found)
    assert not torch.equal(before, found)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", ["llama, tied", "gpt2"])
def test_a_model_of_inference_mode_is_pruned_to_the_same_bits(kind: str, compress: bool) -> None:
    options: dict[str, Any] = {"compress": compress, "recover": 2, "progress": False}
    plain = tiny(kind)
    with torch.inference_mode():
        model = copy.deepcopy(plain)
        ids = IDS.clone()
    assert all(parameter.is_inference() for parameter in model.parameters())
    for each, tokens in ((plain, IDS), (model, ids)):
        s3.llm.prune_model(each, [tokens], "2:4", **options)
    assert content(model) == content(plain)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied  # in both kinds
    assert torch.equal(logits(model), logits(plain))
