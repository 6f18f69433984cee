"""S3 patterns: a View, a Block and a Scope (A. Ghriss, arXiv 2604.11315, section 3).

``Pattern`` is the rule without a shape; ``BoundPattern`` is that rule on one weight shape. Both are
frozen values: hashable, comparable, picklable, so that they can ride in a compiled graph's guards.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from s3tensor.errors import PatternError
from s3tensor.layout import Layout

_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class ViewRule:
    """A parsed view rule in einops words, for example ``m (t h p) -> m t p h``.

    ``inputs`` holds one group of axis names for each dim of the weight, slowest first inside a group;
    ``outputs`` one axis name for each dim of the view.
    """

    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ViewRule:
        """Parse and check a rule; both sides must name the same axes, each once."""
        sides = text.split("->")
        if len(sides) != 2:
            raise PatternError(f"view rule {text!r} needs exactly one '->', as in 'm (t p) -> m p t'")
        inputs = _groups(sides[0], text)
        outputs = _groups(sides[1], text)
        if any(len(group) != 1 for group in outputs):
            raise PatternError(
                f"view rule {text!r} groups axes on its right side; give every axis a dim of its own "
                "and let block or scope span several dims"
            )
        left = [name for group in inputs for name in group]
        right = [group[0] for group in outputs]
        for side, names in (("left", left), ("right", right)):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise PatternError(f"view rule {text!r} repeats {repeated[0]!r} on its {side} side")
        if set(left) != set(right):
            odd = sorted(set(left) ^ set(right))
            raise PatternError(f"view rule {text!r} must name {odd[0]!r} on both sides")
        return cls(inputs, tuple(right))

    def __str__(self) -> str:
        left = " ".join(
            group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.inputs
        )
        return f"{left} -> {' '.join(self.outputs)}"


def _groups(side: str, text: str) -> tuple[tuple[str, ...], ...]:
    """Split one side of a view rule into groups of axis names."""
    groups: list[tuple[str, ...]] = []
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", side)
    for token in tokens:
        names = tuple(token[1:-1].split()) if token.startswith("(") and len(token) > 1 else (token,)
        bad = [name for name in names if not _AXIS.fullmatch(name)]
        if bad or not names:
            raise PatternError(
                f"view rule {text!r} has {(bad or [token])[0]!r}; use axis names such as 'm', grouped "
                "once with balanced parentheses such as '(t p)'"
            )
        groups.append(names)
    if not groups:
        raise PatternError(f"view rule {text!r} has an empty side; write for example 'm k -> m k'")
    return tuple(groups)


@dataclass(frozen=True)
class Pattern:
    """A structured-sparsity pattern, without a shape.

    Args:
        view: rule in einops words that splits and permutes the weight's dims; ``None`` is the identity.
        sizes: sizes of named axes of the rule; at most one axis of each group may be left out.
        block: shape of the unit that is kept or pruned together, in view elements; -1 is the whole dim.
        scope: shape of the set of blocks that compete, **in blocks**; -1 is the whole dim.
        keep: blocks kept in each scope, as a count (int) or as a density in (0, 1] (float).

    Example:
        >>> Pattern.parse("2:4").bind((8, 16)).scope_grid
        (8, 4)
        >>> rows_apart = Pattern(view="(t h r) k -> t r h k", sizes={"h": 2, "r": 8},
        ...                      block=(1, 1, 1, 16), scope=(1, 1, 2, 1), keep=1)
        >>> rows_apart == Pattern.parse("rowpair16")
        True

    Raises:
        PatternError: a rule that does not parse, or parts that contradict each other.
    """

    view: str | None = None
    sizes: tuple[tuple[str, int], ...] | Mapping[str, int] = ()
    block: tuple[int, ...] = (1, 1)
    scope: tuple[int, ...] = (1, -1)
    keep: int | float = 0.5
    name: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        sizes = self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes
        object.__setattr__(self, "sizes", tuple(sorted((str(k), v) for k, v in sizes)))
        object.__setattr__(self, "block", tuple(self.block))
        object.__setattr__(self, "scope", tuple(self.scope))
        if self.view is not None:
            object.__setattr__(self, "view", str(self.rule))  # one spelling for one rule
        self._check_sizes()
        self._check_tiles()
        self._check_keep()

    def _check_sizes(self) -> None:
        inputs = self.rule.inputs if self.view is not None else ()
        axes = {name for group in inputs for name in group}
        for name, size in self.sizes:
            if name not in axes:
                raise PatternError(f"sizes names {name!r}, which view rule {self.view!r} does not have")
            if not _is_int(size) or size < 1:
                raise PatternError(f"size of axis {name!r} must be an int >= 1, got {size!r}")
        given = {name for name, _ in self.sizes}
        for group in inputs:
            unknown = [name for name in group if name not in given]
            if len(unknown) > 1:
                raise PatternError(
                    f"view rule {self.view!r} leaves {unknown} of one group open; give all but one of "
                    "them in sizes"
                )

    def _check_tiles(self) -> None:
        for what, values in (("block", self.block), ("scope", self.scope)):
            bad = [v for v in values if not _is_int(v) or (v < 1 and v != -1)]
            if bad or not values:
                raise PatternError(
                    f"{what} {values} must hold an int >= 1, or -1 for the whole dim, for each view dim"
                )
        ndim = len(self.rule.outputs) if self.view is not None else len(self.block)
        if len(self.block) != ndim or len(self.scope) != ndim:
            raise PatternError(
                f"block {self.block} and scope {self.scope} need one entry for each of the {ndim} dims "
                f"of the view {self.view or 'identity'!r}"
            )

    def _check_keep(self) -> None:
        if _is_int(self.keep):
            blocks = math.prod(self.scope) if -1 not in self.scope else None
            if self.keep < 1 or (blocks is not None and self.keep > blocks):
                raise PatternError(
                    f"keep={self.keep} of a scope of {blocks or 'n'} blocks; a count must be from 1 to "
                    f"{blocks or 'the number of blocks in a scope'}"
                )
        elif not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0:
            raise PatternError(
                f"keep={self.keep!r} must be a count of blocks (int >= 1) or a density (float in (0, 1])"
            )

    @property
    def rule(self) -> ViewRule:
        """The parsed view rule; only for patterns whose view is not the identity."""
        if self.view is None:
            raise PatternError("an identity view has no rule")
        return _parse_rule(self.view)

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Pattern from its string: a preset such as ``2:4``, or parts such as ``block=1,2; scope=1,4; keep=2``.

        Raises:
            PatternError: with the whole grammar, when the string is neither.
        """
        return text if isinstance(text, Pattern) else _parse(text)

    @property
    def parts(self) -> str:
        """The pattern spelled out, free of presets: ``Pattern.parse(p.parts) == p`` everywhere."""
        fields = []
        if self.view is not None:
            fields.append(f"view={self.view}")
        if self.sizes:
            fields.append("sizes=" + ",".join(f"{name}:{size}" for name, size in self.sizes))
        fields.append("block=" + ",".join(map(str, self.block)))
        fields.append("scope=" + ",".join(map(str, self.scope)))
        fields.append(f"keep={self.keep!r}")
        return "; ".join(fields)

    def __str__(self) -> str:
        return self.name or self.parts

    def bind(self, shape: tuple[int, ...]) -> BoundPattern:
        """This rule on a weight of ``shape``.

        Raises:
            PatternError: naming the dim, the sizes and the remedy, when the pattern does not fit.
        """
        return _bind(self, tuple(int(n) for n in shape))


@dataclass(frozen=True)
class BoundPattern:
    """A pattern on one weight shape, stored contiguously. Made by :meth:`Pattern.bind`.

    Blocks of one scope are numbered in row-major order of their view coordinates, and scopes likewise.
    """

    pattern: Pattern
    shape: tuple[int, ...]
    view: Layout
    block: tuple[int, ...]
    scope: tuple[int, ...]
    keep: int

    @cached_property
    def block_grid(self) -> tuple[int, ...]:
        """Number of blocks along each view dim."""
        return tuple(n // b for n, b in zip(self.view.shape, self.block, strict=True))

    @cached_property
    def scope_grid(self) -> tuple[int, ...]:
        """Number of scopes along each view dim."""
        return tuple(n // s for n, s in zip(self.block_grid, self.scope, strict=True))

    @cached_property
    def scopes(self) -> int:
        """Number of scopes in the weight."""
        return math.prod(self.scope_grid)

    @cached_property
    def blocks_per_scope(self) -> int:
        """Number of blocks that compete in one scope."""
        return math.prod(self.scope)

    @cached_property
    def block_size(self) -> int:
        """Elements in one block."""
        return math.prod(self.block)

    @cached_property
    def density(self) -> float:
        """Kept fraction of the weight."""
        return self.keep / self.blocks_per_scope

    @cached_property
    def tiles(self) -> Layout:
        """The view as ``scope_grid + scope + block`` modes: offset of element e of block b of scope s."""
        blocks, inside = self.view.divide(self.block)
        scopes, competing = blocks.divide(self.scope)
        return Layout(
            scopes.shape + competing.shape + inside.shape,
            scopes.stride + competing.stride + inside.stride,
        )

    @cached_property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(sizes, order)``: ``weight.reshape(sizes).permute(order)`` has the shape of ``tiles``.

        A compact layout is a permuted contiguous tensor, so tiling needs no ``as_strided``.
        """
        by_stride = sorted(
            range(len(self.tiles.shape)), key=lambda i: (-self.tiles.stride[i], self.tiles.shape[i])
        )
        order = tuple(by_stride.index(i) for i in range(len(by_stride)))
        return tuple(self.tiles.shape[i] for i in by_stride), order

    @cached_property
    def row_period(self) -> int:
        """Rows (dim 0) in the smallest group that no scope crosses.

        Rows can be pruned in chunks of whole groups: each chunk is the same pattern on fewer rows.
        """
        row = math.prod(self.shape[1:])
        spans = [1]
        span = zip(self.view.shape, self.view.stride, self.block, self.scope, strict=True)
        for _, stride, block, scope in span:
            if stride >= row and block * scope > 1:
                spans.append(stride // row * block * scope)
        return max(spans)

    @cached_property
    def index_code(self) -> Literal["none", "index", "bitmap"]:
        """How kept blocks are recorded: nothing when all are kept, else the cheaper of the other two."""
        if self.keep == self.blocks_per_scope:
            return "none"
        return "index" if self.keep * self.index_bits <= self.blocks_per_scope else "bitmap"

    @cached_property
    def index_bits(self) -> int:
        """Bits that number the blocks of one scope."""
        return (self.blocks_per_scope - 1).bit_length()

    @cached_property
    def packed_shape(self) -> tuple[int, int, int]:
        """Shape of the kept values: (scopes, keep, block_size)."""
        return self.scopes, self.keep, self.block_size

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of the packed indices of the whole weight."""
        per_scope = {
            "none": 0,
            "index": self.keep * self.index_bits,
            "bitmap": self.blocks_per_scope,
        }[self.index_code]
        return -(-self.scopes * per_scope // 8)

    def packed_bytes(self, itemsize: int) -> int:
        """Bytes of the packed weight, values and indices, with values of ``itemsize`` bytes."""
        return math.prod(self.packed_shape) * itemsize + self.index_bytes

    def __str__(self) -> str:
        return f"{self.pattern} on {'x'.join(map(str, self.shape))}"


Preset = Callable[..., Pattern]
_PRESETS: dict[str, tuple[re.Pattern[str], str, Preset]] = {}


def preset(syntax: str, regex: str, meaning: str) -> Callable[[Preset], Preset]:
    """Register a named pattern: the groups of ``regex`` are the arguments of the decorated function.

    ``syntax`` and ``meaning`` are what the grammar shows to a user whose string does not parse.
    """

    def register(build: Preset) -> Preset:
        _PRESETS[syntax] = (re.compile(regex), meaning, build)
        _parse.cache_clear()
        return build

    return register


def grammar() -> str:
    """Every way to write a pattern, one a line."""
    forms = {syntax: meaning for syntax, (_, meaning, _) in _PRESETS.items()}
    forms["view=RULE; sizes=AXIS:N,...; block=...; scope=...; keep=N|DENSITY"] = (
        "any pattern by its parts; view and sizes may be left out, -1 is a whole dim"
    )
    width = max(len(syntax) for syntax in list(forms)[:-1])
    return "\n".join(f"  {syntax:<{width}}  {meaning}" for syntax, meaning in forms.items())


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Pattern:
    if not isinstance(text, str):
        raise PatternError(f"a pattern is a Pattern or a string, got {type(text).__name__}")
    word = text.strip()
    for regex, _, build in _PRESETS.values():
        match = regex.fullmatch(word)
        if match:
            made = build(*match.groups())
            return Pattern(made.view, made.sizes, made.block, made.scope, made.keep, name=word)
    if "=" in word:
        return _parse_parts(word)
    raise PatternError(f"unknown pattern {text!r}; a pattern is one of\n{grammar()}")


def _parse_parts(text: str) -> Pattern:
    parts: dict[str, str] = {}
    for item in text.split(";"):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or key not in ("view", "sizes", "block", "scope", "keep") or key in parts:
            raise PatternError(f"cannot read {item.strip()!r} in {text!r}; a pattern is one of\n{grammar()}")
        parts[key] = value
    missing = [key for key in ("block", "scope", "keep") if key not in parts]
    if missing:
        raise PatternError(f"pattern {text!r} lacks {missing[0]!r}; a pattern is one of\n{grammar()}")
    try:
        pairs = [pair.split(":") for pair in parts.get("sizes", "").split(",") if pair.strip()]
        sizes = {name.strip(): int(size) for name, size in pairs}
        block = tuple(int(n) for n in parts["block"].split(","))
        scope = tuple(int(n) for n in parts["scope"].split(","))
        keep = int(parts["keep"]) if parts["keep"].isdigit() else float(parts["keep"])
    except ValueError as error:
        raise PatternError(f"cannot read the numbers of {text!r} ({error})") from None
    return Pattern(parts.get("view"), sizes, block, scope, keep)


@functools.lru_cache(maxsize=256)
def _parse_rule(text: str) -> ViewRule:
    return ViewRule.parse(text)


@functools.lru_cache(maxsize=1024)
def _bind(pattern: Pattern, shape: tuple[int, ...]) -> BoundPattern:
    view, origins = _view(pattern, shape)
    block = _whole(pattern.block, view.shape, (1,) * len(view.shape))
    scope = _whole(pattern.scope, view.shape, block)
    for axis, (n, b, s) in enumerate(zip(view.shape, block, scope, strict=True)):
        tile = b if pattern.scope[axis] == -1 else b * s
        if n % tile:
            dim, others = origins[axis]
            step = tile * others
            raise PatternError(
                f"{pattern} does not fit a weight of shape {shape}: dim {dim} has {shape[dim]} "
                f"elements, not a multiple of {step} (block {b}"
                f"{f' x scope {s}' if tile != b else ''}"
                f"{f' x other axes {others}' if others > 1 else ''}); pad dim {dim} to "
                f"{-(-shape[dim] // step) * step}, choose another pattern, or leave this weight dense"
            )
    blocks = math.prod(scope)
    keep = pattern.keep if _is_int(pattern.keep) else math.floor(pattern.keep * blocks + 0.5)
    if not 1 <= keep <= blocks:
        raise PatternError(
            f"{pattern} keeps {keep} of the {blocks} blocks of a scope on shape {shape}; it must keep "
            f"from 1 to {blocks}"
        )
    return BoundPattern(pattern, shape, view, block, scope, int(keep))


def _view(pattern: Pattern, shape: tuple[int, ...]) -> tuple[Layout, list[tuple[int, int]]]:
    """The view's layout, and for each view dim its weight dim and the size of that dim's other axes."""
    ndim = len(pattern.rule.inputs) if pattern.view is not None else len(pattern.block)
    if len(shape) != ndim:
        raise PatternError(
            f"{pattern} is a pattern of {ndim}-dim weights, got shape {shape} of {len(shape)} dims; "
            "reshape the weight or choose another pattern"
        )
    if any(n < 1 for n in shape):
        raise PatternError(f"{pattern} cannot be bound to the empty shape {shape}; every dim must be >= 1")
    whole = Layout.row_major(shape)
    if pattern.view is None:
        return whole, [(dim, 1) for dim in range(ndim)]
    sizes = dict(pattern.sizes)
    modes: dict[str, tuple[int, int, int]] = {}
    for dim, group in enumerate(pattern.rule.inputs):
        known = math.prod(sizes.get(name, 1) for name in group)
        is_open = any(name not in sizes for name in group)
        if shape[dim] % known or (not is_open and shape[dim] != known):
            need = f"a multiple of {known}" if is_open else f"{known}"
            raise PatternError(
                f"{pattern} does not fit a weight of shape {shape}: dim {dim} has {shape[dim]} elements, "
                f"but its axes ({' '.join(group)}) need {need}; pad dim {dim} to "
                f"{-(-shape[dim] // known) * known}, choose another pattern, or leave this weight dense"
            )
        stride = whole.stride[dim]
        for name in reversed(group):
            size = sizes.get(name, shape[dim] // known)
            modes[name] = (size, stride, dim)
            stride *= size
    order = [modes[name] for name in pattern.rule.outputs]
    layout = Layout(tuple(mode[0] for mode in order), tuple(mode[1] for mode in order))
    given = [math.prod(sizes.get(n, 1) for n in pattern.rule.inputs[dim]) for _, _, dim in order]
    own = [sizes.get(name, 1) for name in pattern.rule.outputs]
    return layout, [(m[2], g // o) for m, g, o in zip(order, given, own, strict=True)]


def _whole(tile: tuple[int, ...], shape: tuple[int, ...], unit: tuple[int, ...]) -> tuple[int, ...]:
    """``tile`` with each -1 replaced by the whole dim, counted in ``unit`` elements."""
    return tuple(
        max(1, n // u) if t == -1 else t for t, n, u in zip(tile, shape, unit, strict=True)
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
