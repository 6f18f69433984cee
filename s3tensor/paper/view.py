"""View: a strided layout over a parameter's own memory (S3, arXiv 2604.11315, section 3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.pattern import Pattern, ViewRule
from s3tensor.pattern.layout import Layout, as_ints


@dataclass(frozen=True, eq=False)
class View:
    """A parameter's elements in another shape and order; nothing is copied.

    Strides count elements of memory from the parameter's first element, as in ``torch.as_strided``; for a
    contiguous parameter an offset is the row-major index of an element. To split a parameter that is not
    contiguous, or another view, use :meth:`from_rule`.

    Args:
        param: a parameter, a tensor, or another view.
        shape: sizes of the view.
        stride: elements between neighbours along each dim.
        offset: element of ``param``, counted in its memory, at which the view begins.

    Example:
        >>> weight = torch.nn.Parameter(torch.arange(32.).reshape(2, 16))
        >>> pairs = View(weight, shape=(2, 8, 2), stride=(16, 1, 8))
        >>> pairs.data[0, 3].tolist()
        [3.0, 11.0]

    Raises:
        PatternError: an empty, overlapping or out-of-bounds view, or one that touches memory between the
            elements of a parameter that is itself a slice.
    """

    param: Tensor | View
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        base = memory(self.param)
        object.__setattr__(self, "shape", as_ints("view shape", self.shape, 1))
        object.__setattr__(self, "stride", as_ints("view stride", self.stride, 0))
        (offset,) = as_ints("view offset", (self.offset,), 0)
        object.__setattr__(self, "offset", offset)
        layout = Layout(self.shape, self.stride)
        if not layout.is_injective:
            raise PatternError(
                f"view {layout} reads an element twice, and a projection of overlapping blocks is not "
                "defined; choose strides that reach every element once"
            )
        own = Layout(tuple(base.shape), tuple(base.stride()))
        try:
            layout.check_bounds(own.cosize, offset)
        except PatternError as error:
            raise PatternError(f"view of a parameter of shape {own.shape}: {error}") from None
        if not own.is_compact and (own, 0) != (layout, offset):
            # Memory between the parameter's own elements belongs to another tensor.
            mine = torch.zeros(own.cosize, dtype=torch.bool, device="cpu")
            torch.as_strided(mine, own.shape, own.stride).fill_(True)
            if not bool(torch.as_strided(mine, self.shape, self.stride, offset).all()):
                raise PatternError(
                    f"view {layout} from element {offset} touches memory between the elements of a "
                    f"parameter of shape {own.shape} and stride {own.stride}; use View.from_rule"
                )
        object.__setattr__(self, "_origin", (own.shape, own.stride))

    @classmethod
    def from_existing(cls, param: Tensor | View) -> View:
        """The view of all elements in the parameter's own shape, also where it is not contiguous."""
        if isinstance(param, View):
            return param
        base = memory(param)
        return cls(param, tuple(base.shape), tuple(base.stride()))

    @classmethod
    def from_rule(
        cls, param: Tensor | View, rule: str, sizes: Mapping[str, int] | None = None
    ) -> View:
        """The view of a rule in einops words, such as ``m (t p) -> m p t``.

        It is composed on the parameter's own strides, so that ``view.data`` equals
        ``einops.rearrange(param, rule, **sizes)`` for parameters and views of any layout.

        Raises:
            PatternError: a rule that does not parse, or does not fit the shape.
        """
        base = memory(param)
        parsed = ViewRule.parse(rule)
        ones = (1,) * len(parsed.outputs)
        bound = Pattern(rule, sizes or {}, ones, ones, 1).bind(tuple(base.shape))
        size = dict(zip(parsed.outputs, bound.view.shape, strict=True))
        layout = parsed.layout(size, base.stride())
        return cls(param, layout.shape, layout.stride)

    @property
    def data(self) -> Tensor:
        """The elements in the view's shape, live: writing to it writes to the parameter.

        Raises:
            PatternError: when the parameter's shape or strides changed since the view was made.
        """
        base = memory(self.param)
        if (tuple(base.shape), base.stride()) != self._origin:  # type: ignore[attr-defined]
            raise PatternError(
                f"the parameter has shape {tuple(base.shape)} and stride {base.stride()} now, and the "
                "view was made for another; make the view again"
            )
        return torch.as_strided(base, self.shape, self.stride, base.storage_offset() + self.offset)

    @property
    def layout(self) -> Layout:
        """Shape and stride, as a layout from the view's first element."""
        return Layout(self.shape, self.stride)

    @property
    def ndim(self) -> int:
        """Dims of the view."""
        return len(self.shape)

    @property
    def cosize(self) -> int:
        """One past the largest offset from the view's first element."""
        return self.layout.cosize

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self.param.dtype

    @property
    def device(self) -> torch.device:
        """The parameter's device."""
        return self.param.device

    def numel(self) -> int:
        """Elements in the view."""
        return math.prod(self.shape)

    def of(
        self,
        values: Tensor,  # the shape of param
    ) -> Tensor:
        """Other values of the parameter's shape, such as a gradient or scores, read through the view."""
        base = memory(self.param)
        if values.shape != base.shape:
            raise PatternError(
                f"values of shape {tuple(values.shape)} for a parameter of shape {tuple(base.shape)}; "
                "they must be equal"
            )
        laid = torch.empty_strided(
            base.shape, base.stride(), dtype=values.dtype, device=values.device
        )
        laid.copy_(values.detach())
        return torch.as_strided(laid, self.shape, self.stride, self.offset)

    def to_param(
        self,
        values: Tensor,  # broadcastable to the view's shape
        fill: float | bool = 0,
    ) -> Tensor:
        """The inverse of :meth:`of`: a new tensor of the parameter's shape, ``fill`` outside the view."""
        base = memory(self.param)
        laid = torch.empty_strided(
            base.shape, base.stride(), dtype=values.dtype, device=values.device
        )
        laid.fill_(fill)
        torch.as_strided(laid, self.shape, self.stride, self.offset).copy_(values)
        return laid

    @staticmethod
    def block_view_of(
        t: Tensor, block_shape: Sequence[int], reorder: bool = True, merge: bool = False
    ) -> Tensor:
        """Any tensor by blocks, a live view unless ``merge`` has to copy.

        Returns:
            (*grid_shape, *block_shape); with ``reorder=False`` interleaved, (g0, b0, g1, b1, ...); with
            ``merge=True`` (*grid_shape, elements of a block).

        Raises:
            PatternError: blocks that do not tile the tensor.
        """
        block = whole_dims("block", block_shape, tuple(t.shape), "elements")
        # A split of dims is always a view, of any strides.
        pairs = zip(t.shape, block, strict=True)
        interleaved = t.view([size for n, b in pairs for size in (n // b, b)])
        if merge:
            return grid_first(interleaved).flatten(t.ndim)
        return grid_first(interleaved) if reorder else interleaved

    @staticmethod
    def broadcast_block_to_element(
        block_values: Tensor,  # (*grid_shape)
        block_shape: Sequence[int],
        fake: bool = False,
    ) -> Tensor:
        """A value for each block, spread over its elements.

        With ``fake=True`` nothing is spread: shape (g0, 1, g1, 1, ...), which broadcasts against the
        interleaved :meth:`block_view_of`.

        Raises:
            PatternError: not one size for each dim of the grid.
        """
        block = as_ints("block shape", block_shape, 1)
        if len(block) != block_values.ndim:
            raise PatternError(
                f"block shape {block} for values of shape {tuple(block_values.shape)}; give one size for "
                "each dim of the grid"
            )
        pairs = list(zip(block_values.shape, block, strict=True))
        thin = block_values.reshape([size for n, _ in pairs for size in (n, 1)])
        if fake:
            return thin
        spread = thin.expand([size for pair in pairs for size in pair])
        return spread.reshape([n * b for n, b in pairs])

    def apply_mask(
        self,
        mask: Tensor,  # (*grid_shape) bool
        block_shape: Sequence[int],
    ) -> None:
        """Zero every block where ``mask`` is **True**, in place, outside autograd.

        Raises:
            PatternError: blocks that do not tile the view, or a mask that is not one bool for each.
        """
        if mask.dtype != torch.bool:
            raise PatternError(f"a mask is bool, True where a block is zeroed, got {mask.dtype}")
        with torch.no_grad():
            blocks, spread = self._against(mask, block_shape)
            blocks.masked_fill_(spread, 0.0)

    def apply_multiplier(
        self,
        multiplier: Tensor,  # (*grid_shape)
        block_shape: Sequence[int],
    ) -> None:
        """Multiply every element of a block by its block's factor, in place, outside autograd.

        Raises:
            PatternError: blocks that do not tile the view, or a multiplier that is not one value for each.
        """
        with torch.no_grad():
            blocks, spread = self._against(multiplier, block_shape)
            blocks.mul_(spread.to(self.dtype))

    def _against(self, values: Tensor, block_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The interleaved blocks, live, and a value for each that broadcasts against them."""
        blocks = View.block_view_of(self.data, block_shape, reorder=False)
        if tuple(values.shape) != tuple(blocks.shape[::2]):
            raise PatternError(
                f"values of shape {tuple(values.shape)} for a grid of {tuple(blocks.shape[::2])} blocks; "
                "give one value a block"
            )
        spread = View.broadcast_block_to_element(values.detach(), blocks.shape[1::2], fake=True)
        return blocks, spread.to(self.device)

    def linear_offset(
        self,
        idx: Tensor,  # (..., ndim) integers
    ) -> Tensor:
        """Where elements of the view lie in memory: elements from the parameter's first, (...) int64.

        Raises:
            PatternError: not an integer for each dim, or an index out of the view.
        """
        index = self._inside(idx)
        return (index * index.new_tensor(self.stride)).sum(-1) + self.offset

    def to_param_rc(
        self,
        idx: Tensor,  # (..., ndim) integers
    ) -> tuple[Tensor, Tensor]:
        """Row and column in the parameter of elements of the view, each (...) int64.

        Raises:
            PatternError: a parameter that is not a matrix, or as :meth:`linear_offset`.
        """
        shape = tuple(self.param.shape)
        if len(shape) != 2:
            raise PatternError(
                f"a parameter of shape {shape} has no rows and columns; use linear_offset"
            )
        index = self._inside(idx)
        places = torch.arange(math.prod(shape), device=idx.device).reshape(shape)
        found = self.of(places)[index.unbind(-1)]
        return found // shape[1], found % shape[1]

    def _inside(self, idx: Tensor) -> Tensor:
        """Checked indices, (..., ndim) int64."""
        if idx.dtype.is_floating_point or idx.dtype.is_complex or idx.dtype == torch.bool:
            raise PatternError(f"indices of dtype {idx.dtype}; give integers")
        if idx.ndim == 0 or idx.shape[-1] != self.ndim:
            raise PatternError(
                f"indices of shape {tuple(idx.shape)} into a view of shape {self.shape}; the last dim must "
                f"be {self.ndim}"
            )
        index = idx.long()
        if bool(((index < 0) | (index >= index.new_tensor(self.shape))).any()):
            raise PatternError(f"an index lies outside the view's shape {self.shape}")
        return index

    def __eq__(self, other: object) -> bool:
        """One view: the same parameter, shape, strides and offset."""
        if not isinstance(other, View):
            return NotImplemented
        same = self.param is other.param or (
            isinstance(self.param, View) and self.param == other.param
        )
        return same and self._mode() == other._mode()

    def __hash__(self) -> int:
        param = self.param if isinstance(self.param, View) else id(self.param)
        return hash((param, self._mode()))

    def _mode(self) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        return self.shape, self.stride, self.offset

    def __repr__(self) -> str:
        start = f" from {self.offset}" if self.offset else ""
        return f"View({self.layout}{start} of {'x'.join(map(str, self.param.shape))})"


def whole_dims(what: str, shape: Sequence[int], grid: tuple[int, ...], of: str) -> tuple[int, ...]:
    """``shape`` with -1 filled in, checked to tile ``grid``."""
    given = as_ints(f"{what} shape", shape, -1)
    if len(given) != len(grid) or 0 in given:
        raise PatternError(
            f"{what} shape {given} must hold an int >= 1, or -1 for the whole dim, for each of the "
            f"{len(grid)} dims of {grid}"
        )
    full = tuple(n if size == -1 else size for size, n in zip(given, grid, strict=True))
    for dim, (size, n) in enumerate(zip(full, grid, strict=True)):
        if n % size:
            raise PatternError(
                f"{what} shape {given} does not tile {grid} {of}: dim {dim} has {n}, not a multiple of "
                f"{size}; choose a divisor of {n}, or -1 for the whole dim"
            )
    return full


def grid_first(
    interleaved: Tensor,  # (g0, b0, g1, b1, ...)
) -> Tensor:
    """The dims of the grid, then those inside: (g0, g1, ..., b0, b1, ...)."""
    ndim = interleaved.ndim
    return interleaved.permute(*range(0, ndim, 2), *range(1, ndim, 2))


def memory(param: Tensor | View) -> Tensor:
    """The strided tensor of a parameter or view, sharing its memory, outside autograd.

    Raises:
        TypeError: neither a tensor nor a view.
        PatternError: an empty or integer tensor, or one without strided memory of its own.
    """
    if isinstance(param, View):
        return param.data
    if not isinstance(param, Tensor):
        raise TypeError(f"a spec is bound to a parameter or a View, got {type(param).__name__}")
    if param.numel() == 0:
        raise PatternError(
            f"a parameter of the empty shape {tuple(param.shape)} has no blocks; every dim must be >= 1"
        )
    if not param.dtype.is_floating_point:
        raise PatternError(
            f"a parameter of dtype {param.dtype} has no norms to threshold; use floats"
        )
    # Tensor subclasses made of other tensors, such as compressed weights, have no memory of their own.
    if param.layout != torch.strided or hasattr(param, "__tensor_flatten__"):
        raise PatternError(
            f"a {type(param).__name__} of layout {param.layout} has no strided memory to view; give its "
            "dense weight, to_dense()"
        )
    return param.detach()


def check_disjoint(views: Sequence[View]) -> None:
    """Refuse views that share an element of memory, which two blocks would decide.

    Raises:
        PatternError: naming the first pair.
    """
    spans: list[tuple[int, int, int, View]] = []
    for view in views:
        data = view.data
        if data.device.type == "meta":
            continue
        start = int(data.storage_offset())
        spans.append((data.untyped_storage().data_ptr(), start, start + view.cosize, view))
    for place, (storage, start, stop, view) in enumerate(spans):
        for other_storage, other_start, other_stop, other in spans[:place]:
            if storage != other_storage or start >= other_stop or other_start >= stop:
                continue
            used = torch.zeros(max(stop, other_stop), dtype=torch.bool, device="cpu")
            torch.as_strided(used, other.shape, other.stride, other_start).fill_(True)
            if bool(torch.as_strided(used, view.shape, view.stride, start).any()):
                raise PatternError(
                    f"{other} and {view} share memory, and a projection of overlapping blocks is not "
                    "defined; couple views of disjoint elements"
                )
