"""Packed values of eight bits with a scale for each row: how they are made, undone and multiplied.

Row r of the dense weight is ``scales[r]`` times integers of -127 to 127. Products take one of three ways:

=========  ==========================================================  ====================================
path       what it does                                                what it needs
=========  ==========================================================  ====================================
packed     reads the integers, widens them in registers, tensor        a CUDA device, bfloat16 or float16,
           cores; a row's scale is laid on its float32 sum             tile order, up to 32 rows of x
values     makes packed values of 16 bits on each call, then the path  the same, and more rows of x
           of those (:mod:`s3tensor.tensor.linear`)
scratch    makes the dense weight on each call, then ``F.linear``      nothing
=========  ==========================================================  ====================================
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from s3tensor.errors import NonFiniteError
from s3tensor.mask.packing import form_of, gather, unpack
from s3tensor.pattern import BoundPattern, bind
from s3tensor.tensor import linear as paths
from s3tensor.tensor import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # to compute in
LARGEST = 127  # of the integers; -128 is not used, so that the scale is the same for both signs


@dataclass(frozen=True)
class Int8Weight:
    """A weight as :func:`linear` gets it."""

    packed: Tensor  # (scopes, keep, block_size) int8
    indices: Tensor  # (index_bytes,) uint8
    scales: Tensor  # (rows,) float32
    bound: BoundPattern  # of a matrix
    tiled: bool = False
    transposed: bool = False

    @property
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        out, into = self.bound.shape
        return (into, out) if self.transposed else (out, into)


def to_int8(
    dense: Tensor,  # (rows, columns), under the pattern
    indices: Tensor,  # (index_bytes,) uint8, canonical
    bound: BoundPattern,
) -> tuple[Tensor, Tensor]:
    """Packed integers in canonical order and scales, nearest to the kept values of a dense weight.

    The scale of a row is its largest magnitude over 127, so that no kept value is off by more than half of
    it: symmetric absolute-maximum quantization of weights, per output channel. A row of zeros has scale 0.

    Raises:
        NonFiniteError: NaN or Inf in the weight.
    """
    whole = dense.float()
    largest = whole.abs().amax(1)
    if not bool(torch.isfinite(largest).all()):
        raise NonFiniteError(
            f"the weight of shape {bound.shape} holds NaN or Inf; repair it before it is quantized"
        )
    # Divided by a tensor: by a number, CUDA multiplies with the inverse, which rounds otherwise.
    scales = largest / torch.full_like(largest, LARGEST)
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)  # never denormal
    # A scale that was rounded up must not take the largest value beyond float32.
    scales = torch.where(torch.isinf(scales * LARGEST), scales * (1 - 2**-23), scales)
    integers = (whole / scales[:, None]).round_().clamp_(-LARGEST, LARGEST)
    packed = gather(integers, indices, bound).to(torch.int8)
    return packed, torch.where(largest > 0, scales, 0.0)


def dense_of(weight: Int8Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight of the bound shape: integers times scales, rounded once to the dtype."""
    packed = weight.packed
    if packed.is_cuda:  # the kernels that unpack take 16 bits; the integers are exact in them
        view = _retiled(packed, weight.bound) if weight.tiled else packed
        packed = view.to(torch.float16, memory_format=torch.contiguous_format).view(packed.shape)
    integers = unpack(packed, weight.indices, weight.bound, weight.tiled)
    if dtype == torch.float64:
        return integers.double() * weight.scales.double()[:, None]
    dense = torch.empty(weight.bound.shape, dtype=dtype, device=packed.device)
    return torch.mul(integers, weight.scales[:, None], out=dense)


def _retiled(packed: Tensor, bound: BoundPattern) -> Tensor:
    """Values that lie in the tile order of int8, as a view in that of 16-bit values."""
    from s3tensor.kernels import tiles  # type: ignore[import-not-found]

    view: Tensor = tiles.bytes_as_wide(packed, *bound.shape)
    return view


def packed_of(weight: Int8Weight, dtype: torch.dtype) -> Tensor | None:
    """Packed values of 16 bits in tile order: integers times scales, rounded once, by one kernel.

    None for rowpair16, whose packed rows are of two rows with a scale each.
    """
    if not weight.tiled or form_of(weight.bound) == "rowpair16":
        return None
    view = _retiled(weight.packed, weight.bound)
    of_rows = weight.scales.view(-1, 1, 2, 8, 1, 1)
    values = torch.empty(view.shape, dtype=dtype, device=view.device)
    return torch.mul(view, of_rows, out=values).view(weight.bound.packed_shape)


# linear -----------------------------------------------------------------------------------------------


def choose(weight: Int8Weight, dtype: torch.dtype, batch: int) -> str:
    """The path for ``batch`` rows of x, by what the weight, the dtype and the device allow."""
    form, device = form_of(weight.bound), weight.packed.device
    if device.type != "cuda" or not weight.tiled or weight.transposed or form is None:
        return "scratch"
    kernels = paths.packed_kernels()
    if kernels is None or kernels.refusal(form, dtype, *weight.bound.shape, device) is not None:
        return "scratch"
    if batch <= kernels.MOST_ROWS_INT8:
        return "packed"
    return "scratch" if form == "rowpair16" or batch > kernels.MOST_ROWS else "values"


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None, path: str | None = None) -> Tensor:
    """``F.linear(x, W, bias)`` by the path of :func:`choose`, or by the named one; contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices that do not belong together, as ``F.linear`` does.
    """
    _check(x, weight.packed, weight.scales, bias, weight.bound, weight.transposed)
    out, into = weight.features
    if x.numel() == 0:
        empty = x.new_zeros(*x.shape[:-1], out)
        return empty if bias is None else empty + bias
    path = path or choose(weight, x.dtype, x.numel() // into)
    bias = paths.bias_of_rows(bias, out)
    if path == "packed":
        y: Tensor = paths.packed_kernels().linear(
            x.reshape(-1, into), weight.packed, weight.indices, bias, form=form_of(weight.bound),
            rows=out, columns=into, tiled=True, overlap=True, scales=weight.scales,
        )  # fmt: skip
        return y.view(*x.shape[:-1], out)
    if path == "values":
        values = packed_of(weight, x.dtype)
        assert values is not None
        wide = paths.Weight(values, weight.indices, weight.bound, tiled=True)
        graph = x.is_cuda and torch.cuda.is_current_stream_capturing()
        batch = x.numel() // into
        return paths.linear(x, wide, bias, paths.choose(wide, batch, graph))
    if x.is_cuda:
        _warn_scratch(str(weight.bound.pattern), x.dtype)
    dense = dense_of(weight, x.dtype)
    return F.linear(x, dense.t() if weight.transposed else dense, bias).contiguous()


@functools.lru_cache(maxsize=256)  # once for each
def _warn_scratch(pattern: str, dtype: torch.dtype) -> None:
    warnings.warn(
        f"an int8 weight is made dense in a scratch on each call, as there is no kernel for {pattern} in "
        f"{dtype} with so many rows of x: right, but slower than a dense layer (this warning is shown once)",
        UserWarning,
        stacklevel=2,
    )


@torch.library.custom_op(
    "s3tensor::linear_int8",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor packed, Tensor indices, Tensor scales, Tensor? bias, str pattern, "
        "SymInt[] shape, bool transposed=False, bool tiled=False) -> Tensor"
    ),
)
def linear_int8(
    x: Tensor,  # (..., in_features)
    packed: Tensor,  # (scopes, keep, block_size) int8
    indices: Tensor,  # (index_bytes,) uint8
    scales: Tensor,  # (shape[0],) float32
    bias: Tensor | None,  # (out_features,)
    pattern: str,
    shape: Sequence[int],
    transposed: bool = False,
    tiled: bool = False,
) -> Tensor:  # (..., out_features), contiguous
    """``F.linear(x, weight, bias)`` of a weight with int8 values: what a compiled graph holds for it.

    Args:
        shape: the stored shape, (out_features, in_features), or its reverse when ``transposed`` is set.
        tiled: packed and indices are in tile order (:mod:`s3tensor.kernels.tiles`).

    Raises:
        RuntimeError: sizes, dtypes or devices that do not belong together, as ``F.linear`` does.
    """
    bound = bind(pattern, shape)
    return linear(x, Int8Weight(packed, indices, scales, bound, tiled, transposed), bias)


@linear_int8.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    pattern: str,
    shape: Sequence[int],
    transposed: bool = False,
    tiled: bool = False,
) -> Tensor:
    bound = bind(pattern, shape)
    _check(x, packed, scales, bias, bound, transposed)
    return x.new_empty(*x.shape[:-1], bound.shape[1] if transposed else bound.shape[0])


def _check(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    bound: BoundPattern,
    transposed: bool,
) -> None:
    torch._check(len(bound.shape) == 2, lambda: f"linear_int8 takes a matrix, got {bound}")
    out, into = bound.shape[::-1] if transposed else bound.shape
    ops.check_x("linear_int8", x, into)
    devices = {t.device for t in (x, packed, scales, bias) if t is not None}
    torch._check(
        len(devices) == 1,
        lambda: (
            f"linear_int8: x is on {x.device}, the weight on {packed.device}, its scales on {scales.device}"
            + ("" if bias is None else f", its bias on {bias.device}")
            + "; move them to one device"
        ),
    )
    torch._check(
        x.dtype in DTYPES and packed.dtype == torch.int8 and scales.dtype == torch.float32,
        lambda: (
            f"linear_int8: x is {x.dtype}, values {packed.dtype}, scales {scales.dtype}; it takes float32, "
            "float16 and bfloat16, int8 and float32"
        ),
    )
    torch._check(
        tuple(packed.shape) == bound.packed_shape and tuple(scales.shape) == bound.shape[:1],
        lambda: (
            f"linear_int8: values of shape {tuple(packed.shape)} and scales of {tuple(scales.shape)}; "
            f"{bound} has {bound.packed_shape} and {bound.shape[:1]}"
        ),
    )
    ops.check_bias("linear_int8", x, bias, out)
