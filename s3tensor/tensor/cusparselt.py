"""The product of a dense 2:4 weight by sparse tensor cores, and where it is faster than the dense product.

cuSPARSELt multiplies by a compressed copy of the weight. In training the weight changes with each step, so
its copy is made anew for each product, by a kernel of ours: torch's own compression takes longer than the
product saves. The gradient of the weight is a dense product, as all of it is needed.

When a size first occurs both ways are timed on the tensors at hand, cuSPARSELt's with the algorithms that
were fastest for like sizes on a measured GPU (:mod:`s3tensor.tensor.timings`). Its own search of an
algorithm is not used: in float16 on an H200 that of version 0.8.0 fails and takes the process's CUDA
context along.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.mask.projection import project
from s3tensor.tensor import linear as paths

_HALF = (torch.bfloat16, torch.float16)
TILE = 64  # rows and columns of the weight come in these
_LEAD = 40_000_000  # cycles of the GPU, about 20 ms, in which the host runs ahead of what is timed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, both: bool) -> Tensor:
    """``F.linear(x, weight, bias)``, by sparse tensor cores where that is faster.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), at most 2 of each 4 neighbours in a row other than zero.
        bias: (out_features,) or None.
        both: the transpose of the weight is so too; then the gradient of x takes it.
    """
    if x.is_cuda and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    reason = _refusal(x, weight)
    if reason:
        if not torch.compiler.is_compiling():
            _say("refused", reason)
        return F.linear(x, weight, bias)
    y = product(x.reshape(-1, x.shape[-1]), weight, False, both)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def _refusal(x: Tensor, weight: Tensor) -> str:
    """Why a product cannot run by sparse tensor cores, from what a compiler knows of it; or empty."""
    if not x.is_cuda:
        return f"x is on {x.device.type}"
    if weight.device != x.device or weight.shape[1] != x.shape[-1]:
        return "x does not fit the weight"  # the dense product says how
    if not torch.compiler.is_compiling() and _is_transformed():
        return "x is under a transform of torch.func"
    if x.dtype not in _HALF or weight.dtype != x.dtype:
        return f"x is {x.dtype} and the weight {weight.dtype}; train under torch.autocast"
    return ""


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.library.custom_op(
    "s3tensor::cores_product",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, bool turned, bool both) -> Tensor",
)
def product(x: Tensor, weight: Tensor, turned: bool, both: bool) -> Tensor:
    """``x @ weight.t()``, or ``x @ weight`` where ``turned``: by sparse tensor cores where that is faster.

    Args:
        x: (tokens, columns), or (tokens, rows) where turned.
        weight: (rows, columns) dense, 2:4 along its columns, and along its rows where turned.
        both: it is 2:4 along both.
    """
    x = x.contiguous()
    seen = weight.t() if turned else weight
    plan = _plan(x, seen)
    return F.linear(x, seen) if plan is None else _by_cores(x, seen, plan)


@product.register_fake
def _(x: Tensor, weight: Tensor, turned: bool, both: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if turned else 0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.turned, ctx.both = inputs
    of_x, of_weight, *_ = ctx.needs_input_grad  # as F.linear: what is frozen keeps no activations
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        if ctx.both:
            of_x = product(grad, weight, not ctx.turned, True)
        else:
            of_x = grad @ (weight.t() if ctx.turned else weight)
    if ctx.needs_input_grad[1]:
        of_weight = x.t() @ grad if ctx.turned else grad.t() @ x
    return of_x, of_weight, None, None


product.register_autograd(_gradients, setup_context=_save)


Plan = tuple[int, int, int]  # cuSPARSELt's algorithm, split of K and its mode
_DEFAULT = (0, 1, -1)


def _by_cores(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    from s3tensor.kernels import cores  # type: ignore[import-not-found]

    with torch.cuda.device(x.device):
        compressed = cores.compress(weight)
    return paths.vendor_multiply(paths.vendor_rows(x), compressed, None, plan)[: x.shape[0]]


# the choice -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What was measured of one size of product: of a (rows, columns) weight and about so many tokens."""

    rows: int
    columns: int
    tokens: int
    dense_us: float
    sparse_us: float  # compression included
    call_us: float  # of the host, outside a CUDA graph: cuSPARSELt plans on each call
    plan: Plan

    def least_us(self, graph: bool) -> float:
        """Microseconds by sparse tensor cores, in a CUDA graph or outside one."""
        return self.sparse_us if graph else max(self.sparse_us, self.call_us)

    def is_sparse(self, graph: bool) -> bool:
        """Whether sparse tensor cores are faster."""
        return self.least_us(graph) < self.dense_us


_CHOICES: dict[tuple[Any, ...], Choice] = {}


def choices() -> list[Choice]:
    """What was measured in this process, in the order in which the sizes occurred."""
    return list(_CHOICES.values())


def _plan(x: Tensor, weight: Tensor) -> Plan | None:
    """How to multiply by sparse tensor cores; None for the dense product."""
    if x.numel() == 0 or weight.numel() == 0 or not x.is_cuda:
        return None
    if any(n % TILE for n in weight.shape):
        return None
    graph = torch.cuda.is_current_stream_capturing()
    # Batches of like size share a choice.
    key = (x.device, x.dtype, weight.shape, weight.stride(), (x.shape[0] - 1).bit_length())
    if key not in _CHOICES:
        if graph:
            _say("graph", "a CUDA graph is recorded before a product of this size has run once")
            return None
        if not _knows(x.device):
            name = torch.cuda.get_device_name(x.device)
            _say("device", f"no cuSPARSELt, or none whose format is known, serves the {name}")
            return None
        _CHOICES[key] = _measure(x, weight)
    found = _CHOICES[key]
    if found.is_sparse(graph):
        return found.plan
    _say(
        "slower",
        f"{found.tokens} rows of x by a weight of {found.rows} x {found.columns} take "
        f"{found.dense_us:.0f} us dense and {found.least_us(graph):.0f} us by sparse tensor cores",
    )
    return None


def _measure(x: Tensor, weight: Tensor) -> Choice:
    rows, columns = weight.shape
    ways: dict[Plan | None, Callable[[], Tensor]] = {None: lambda: F.linear(x, weight)}
    for plan in _plans(x.device, rows, columns, x.shape[0]):
        try:
            _by_cores(x, weight, plan)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an algorithm that this version of cuSPARSELt does not have
            continue
        ways[plan] = functools.partial(_by_cores, x, weight, plan)
    device = dict.fromkeys(ways, math.inf)
    host = dict.fromkeys(ways, math.inf)
    with torch.cuda.device(x.device):
        for _ in range(3):
            for way, call in ways.items():
                us, of_call = _timed(call)
                device[way], host[way] = min(device[way], us), min(host[way], of_call)
    dense_us = device.pop(None)
    best = min(device, key=device.__getitem__, default=None)
    least = math.inf if best is None else device[best]
    return Choice(rows, columns, x.shape[0], dense_us, least, host[best], best or _DEFAULT)


def _plans(device: torch.device, rows: int, columns: int, tokens: int) -> list[Plan]:
    """What to try: cuSPARSELt's default, and what was fastest for like sizes on a measured GPU."""
    found = paths._table(device)
    near = [] if found is None else found.vendor_plans(rows, columns, tokens)
    return list(dict.fromkeys([*near, _DEFAULT]))


def _timed(call: Callable[[], Any], calls: int = 4) -> tuple[float, float]:
    """Microseconds of the GPU and of the host for each call."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call()
    torch.cuda._sleep(_LEAD)
    start = time.perf_counter()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    host = time.perf_counter() - start
    last.synchronize()
    return first.elapsed_time(last) * 1e3 / calls, host * 1e6 / calls


@functools.lru_cache(maxsize=64)
def _knows(device: torch.device) -> bool:
    """Whether the kernel's bytes are those that cuSPARSELt reads on a device: they are compared once."""
    if (
        torch.version.hip is not None
        or importlib.util.find_spec("triton") is None
        or not torch.backends.cusparselt.is_available()
    ):
        return False
    from s3tensor.kernels import cores

    weight = torch.randn(128, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.where(project(weight, "2:4"), weight, 0).to(device)
    try:
        with torch.cuda.device(device):
            expected = torch._cslt_compress(weight)
            found = cores.compress(weight)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a GPU that cuSPARSELt does not serve
        return False
    return found.shape == expected.shape and torch.equal(
        found.view(torch.int16), expected.view(torch.int16)
    )


_SAID: set[str] = set()


def _say(kind: str, reason: str) -> None:
    """Say that, and why, a product is dense: once for each kind of reason."""
    if kind in _SAID:
        return
    _SAID.add(kind)
    warnings.warn(
        f"sparse_cores_: {reason}, so the product stays dense (said once; "
        "s3tensor.tensor.cusparselt.choices() lists what was measured)",
        UserWarning,
        stacklevel=3,
    )
