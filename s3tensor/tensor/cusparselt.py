"""cuSPARSELt: products of 2:4 weights by sparse tensor cores, at inference and in training.

cuSPARSELt multiplies by its own compressed copy of the weight. A weight at rest is compressed once and its
copy kept (:func:`compress`). In training the weight changes with each step, so the copy is made again for
each product, by our own kernel: torch's compression takes longer than the product saves. The gradient of
the weight is a dense product, because all of it is needed.

In training, the first product of each size times both ways on the given tensors, cuSPARSELt's with the
algorithms that were fastest for similar sizes on a measured GPU (:mod:`s3tensor.tensor.timings`).
cuSPARSELt's own search is not used: for float16 on an H200, version 0.8.0 fails there and destroys the
process's CUDA context.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.mask import backend
from s3tensor.mask.packing import form_of
from s3tensor.mask.projection import project
from s3tensor.pattern import BoundPattern
from s3tensor.tensor import timings
from s3tensor.tensor.timings import DEFAULT_PLAN, Plan

_HALF = (torch.bfloat16, torch.float16)
# Forms whose dense weight is 2:4 along each row, or becomes so when the even and the odd columns of every
# 8 are separated.
_FORMS = ("2:4", "coupled2:4", "pair4:8")
TILE = 64  # in training, rows and columns of the weight are multiples of this
_LEAD = 40_000_000  # GPU cycles, about 20 ms, in which the host runs ahead of what is timed


# a weight at rest -------------------------------------------------------------------------------------


def takes(bound: BoundPattern, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuSPARSELt takes the weight: one of three forms, 16 bits, whole tiles of 32, a GPU it knows."""
    return (
        form_of(bound) in _FORMS
        and dtype in _HALF
        and all(n % 32 == 0 for n in bound.shape)
        and device.type == "cuda"
        and not backend.is_rocm()
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cusparselt.is_available()
    )


def order_columns(
    t: Tensor,  # (..., columns)
    bound: BoundPattern,
) -> Tensor:
    """``t`` with its columns in the order in which the weight is 2:4: a copy for pair4:8, else itself.

    pair4:8 keeps or prunes two neighbours together, so of every 8 columns 0, 2, 4, 6 are 2:4, and so are
    1, 3, 5, 7. The weight's columns are reordered once, those of x on each call: a read and a write of x.
    """
    if form_of(bound) != "pair4:8":
        return t
    return t.reshape(*t.shape[:-1], -1, 4, 2).transpose(-1, -2).reshape(t.shape)


def compress(dense: Tensor, bound: BoundPattern) -> Tensor:
    """cuSPARSELt's compressed copy of a dense weight of the bound shape that satisfies the pattern."""
    ordered = order_columns(dense, bound).contiguous() + 0.0  # it takes -0.0 for a value
    with torch.cuda.device(dense.device):
        copy: Tensor = torch._cslt_compress(ordered)
    return copy


def pad_rows(x: Tensor) -> Tensor:  # (batch, columns)
    """``x`` with rows of zeros up to a multiple of 16, which cuSPARSELt requires."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % 16)) if x.shape[0] % 16 else x


def multiply(
    x: Tensor,  # (batch, columns), contiguous, batch in multiples of 16
    compressed: Tensor,  # of a (rows, columns) weight
    bias: Tensor | None,  # (rows,), contiguous
    plan: Plan,
) -> Tensor:  # (batch, rows), contiguous
    """``x @ W.t() + bias`` under a plan; columns in the order of :func:`order_columns`."""
    algorithm, split, mode = plan
    with torch.cuda.device(x.device):
        y: Tensor = torch._cslt_sparse_mm(
            compressed,
            x.t(),
            bias=bias,
            transpose_result=True,
            alg_id=algorithm,
            split_k=split,
            split_k_mode=mode,
        )
    return y


@functools.lru_cache(maxsize=1024)
def plan_of(bound: BoundPattern, device: torch.device, batch: int) -> Plan:
    """The plan for ``batch`` rows of x, from the device's table."""
    table = timings.of_device(device)
    if table is None:
        return DEFAULT_PLAN
    rows, columns = bound.shape
    return table.cusparselt_plan(form_of(bound) or "", "bfloat16", rows, columns, batch)


# a weight that is trained -----------------------------------------------------------------------------


def train_linear(x: Tensor, weight: Tensor, bias: Tensor | None, both: bool) -> Tensor:
    """``F.linear(x, weight, bias)``, by sparse tensor cores where that is faster.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features), at most 2 of each 4 neighbours in a row other than zero.
        bias: (out_features,) or None.
        both: the transpose of the weight is 2:4 too; then the gradient of x takes it.
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
    y = cores_product(x.reshape(-1, x.shape[-1]), weight, False, both)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if bias is None else y + bias


def _refusal(x: Tensor, weight: Tensor) -> str:
    """Why sparse tensor cores cannot run a product, from what a compiler knows of it; or empty."""
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
def cores_product(x: Tensor, weight: Tensor, turned: bool, both: bool) -> Tensor:
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


@cores_product.register_fake
def _(x: Tensor, weight: Tensor, turned: bool, both: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if turned else 0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.turned, ctx.both = inputs
    of_x, of_weight, *_ = ctx.needs_input_grad  # as F.linear: a frozen weight keeps no activations
    ctx.save_for_backward(x if of_weight else None, weight if of_x else None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        if ctx.both:
            of_x = cores_product(grad, weight, not ctx.turned, True)
        else:
            of_x = grad @ (weight.t() if ctx.turned else weight)
    if ctx.needs_input_grad[1]:
        of_weight = x.t() @ grad if ctx.turned else grad.t() @ x
    return of_x, of_weight, None, None


cores_product.register_autograd(_gradients, setup_context=_save)


def _by_cores(x: Tensor, weight: Tensor, plan: Plan) -> Tensor:
    with torch.cuda.device(x.device):
        compressed = backend.load("cores").compress(weight)
    return multiply(pad_rows(x), compressed, None, plan)[: x.shape[0]]


# the choice -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What was measured of one size of product: a (rows, columns) weight and about so many tokens."""

    rows: int
    columns: int
    tokens: int
    dense_us: float
    sparse_us: float  # compression included
    call_us: float  # of the host, outside a CUDA graph, where cuSPARSELt plans on each call
    plan: Plan

    def least_us(self, graph: bool) -> float:
        """Microseconds by sparse tensor cores, in a CUDA graph or outside one."""
        return self.sparse_us if graph else max(self.sparse_us, self.call_us)

    def is_sparse(self, graph: bool) -> bool:
        """Whether sparse tensor cores are faster."""
        return self.least_us(graph) < self.dense_us


_CHOICES: dict[tuple[Any, ...], Choice] = {}


def choices() -> list[Choice]:
    """What this process has measured, in the order in which the sizes occurred."""
    return list(_CHOICES.values())


def _plan(x: Tensor, weight: Tensor) -> Plan | None:
    """How to multiply by sparse tensor cores; None for the dense product."""
    if x.numel() == 0 or weight.numel() == 0 or not x.is_cuda:
        return None
    if any(n % TILE for n in weight.shape):
        return None
    graph = torch.cuda.is_current_stream_capturing()
    # Batches of similar size share a choice.
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
    return Choice(rows, columns, x.shape[0], dense_us, least, host[best], best or DEFAULT_PLAN)


def _plans(device: torch.device, rows: int, columns: int, tokens: int) -> list[Plan]:
    """What to try: what was fastest for similar sizes on a measured GPU, and cuSPARSELt's default."""
    table = timings.of_device(device)
    near = [] if table is None else table.cusparselt_plans(rows, columns, tokens)
    return list(dict.fromkeys([*near, DEFAULT_PLAN]))


def _timed(call: Callable[[], Any], calls: int = 4) -> tuple[float, float]:
    """Microseconds that each call takes the GPU and the host."""
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
    """Whether our kernel writes the bytes that cuSPARSELt reads on a device: compared once."""
    cores = backend.load("cores")
    if cores is None or not torch.backends.cusparselt.is_available():
        return False
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
    """Warn that a product stays dense, and why: once for each kind of reason."""
    if kind in _SAID:
        return
    _SAID.add(kind)
    warnings.warn(
        f"sparse_cores_: {reason}, so the product stays dense (said once; "
        "s3tensor.tensor.cusparselt.choices() lists what was measured)",
        UserWarning,
        stacklevel=3,
    )
