"""Whether a model computes the same after a change that must keep its outputs, and what its config builds."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError

_TOKENS = (2, 16)  # sequences and their length


@dataclass(frozen=True)
class Outputs:
    """What a model, or its modules where it takes no ``input_ids``, gave for inputs of our own.

    Args:
        calls: (name, call, output): ``call()`` gives the output again. Empty if nothing could be called.
    """

    calls: tuple[tuple[str, Callable[[], Tensor], Tensor], ...]

    @classmethod
    def of(cls, model: nn.Module, modules: Mapping[str, tuple[nn.Module, nn.Linear]]) -> Outputs:
        """Call the model on tokens spread over its vocabulary, or else each module on random rows.

        Args:
            modules: by name, each with a linear layer that reads its input.
        """
        found = [("", _model_call(model))]
        outputs = [(name, call, _tried(call)) for name, call in found if call is not None]
        if not any(output is not None for *_, output in outputs):
            calls = ((name, _module_call(*each)) for name, each in modules.items())
            outputs = [(name, call, _tried(call)) for name, call in calls]
        return cls(tuple((n, call, output) for n, call, output in outputs if output is not None))

    def check(self, what: str, kept: Tensor | None = None) -> None:
        """Call again and compare.

        Args:
            what: was done, for the message.
            kept: channels of the residual stream that are left, (count,) bool, for a model that returns it.

        Raises:
            ModelError: a call that fails, or a relative change above what rounding makes.
        """
        for name, call, want in self.calls:
            where = f" of {name}" if name else ""
            try:
                got = call()
            except Exception as error:
                raise ModelError(
                    f"the forward{where} fails {what} ({_reason(error)}): it uses them in a way not "
                    "known here; nothing was changed"
                ) from error
            if kept is not None and got.shape != want.shape and want.shape[-1:] == kept.shape:
                want = want[..., kept.to(want.device)]
            change = _relative_change(got, want)
            # Rounding grows over the layers; a part that is used in another way changes about everything.
            allowed = max(1e-3, 16 * torch.finfo(want.dtype).eps)
            if change > allowed:
                raise ModelError(
                    f"the outputs{where} change by {change:.1e} {what}, more than the {allowed:.1e} of "
                    f"rounding in {want.dtype}: it uses them in a way not known here; nothing was changed"
                )


def _relative_change(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if not bool(torch.isfinite(want).all()):
        return 0.0  # nothing to compare
    size, change = want.double().norm(), (got.double() - want.double()).norm()
    return float(change / size) if size > 0 else float(change)


def _tried(call: Callable[[], Tensor]) -> Tensor | None:
    try:
        return call()
    except Exception:  # it takes other inputs
        return None


def _model_call(model: nn.Module) -> Callable[[], Tensor] | None:
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    taken = inspect.signature(model.forward).parameters.values()
    if embedding is None or not any(
        p.name == "input_ids" or p.kind is p.VAR_KEYWORD for p in taken
    ):
        return None
    rows = embedding.num_embeddings
    tokens = torch.arange(math.prod(_TOKENS), device=embedding.weight.device)
    tokens = (tokens * max(1, rows // len(tokens)) % rows).reshape(_TOKENS)
    return lambda: _called(model, input_ids=tokens)


def _module_call(module: nn.Module, reader: nn.Linear) -> Callable[[], Tensor]:
    weight = reader.weight
    drawn = torch.randn(
        4, reader.in_features, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    x = drawn.to(weight.device, weight.dtype)
    return lambda: _called(module, x)


def _called(module: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The first floating-point output in evaluation mode, without gradient or autocast."""
    device = next(iter((*args, *kwargs.values()))).device.type
    with _evaluating(module), torch.no_grad(), torch.autocast(device, enabled=False):
        return next(_floats(module(*args, **kwargs)))


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _floats(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for each in output:
            yield from _floats(each)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def computes_rms_norm(norm: nn.Module, eps: float) -> bool:
    """Whether a module with a ``weight`` is ``x / sqrt(mean(x^2) + eps) * weight``, by its result."""
    weight: Any = norm.weight
    drawn = torch.randn(
        2,
        len(weight),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
        device="cpu",
    )
    x = drawn.to(weight.device, weight.dtype)
    got = _tried(lambda: _called(norm, x))
    wide = x.double()
    want = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.detach().double()
    return got is not None and _relative_change(got, want) < 16 * torch.finfo(weight.dtype).eps


def difference_from_config(model: nn.Module) -> str:
    """How a model of the same class and configuration would differ, or empty.

    Names and shapes of parameters and buffers, and the numbers that modules hold, such as an eps or a scale,
    are compared with a model on the meta device.
    """
    kind: Any = type(model)
    try:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            built: nn.Module = kind(copy.deepcopy(model.config))
    except Exception as error:
        return f"{kind.__name__} cannot be built from it ({_reason(error)})"
    mine, theirs = _shapes(model), _shapes(built)
    for name in {**mine, **theirs}:
        if mine.get(name) != theirs.get(name):
            return f"it gives {name} the shape {theirs.get(name)}, not {mine.get(name)}"
    modules = dict(built.named_modules())
    for path, module in model.named_modules():
        facts = vars(modules.get(path, module))
        for name, value in vars(module).items():
            other = facts.get(name, value)
            if (
                isinstance(value, float)
                and isinstance(other, float)
                and not math.isclose(value, other, rel_tol=1e-6)
            ):
                return f"it gives {path}.{name} the value {other:g}, not {value:g}"
    return ""


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
