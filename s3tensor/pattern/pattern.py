"""S3 patterns: a View, a Block and a Scope (A. Ghriss, arXiv 2604.11315, section 3).

``Pattern`` is the rule without a shape; ``BoundPattern`` is that rule on one weight shape. Both are
frozen values: hashable, comparable, picklable, so that the guards of a compiled graph can hold them.
Spelling does not matter: ``2:4`` equals its parts written out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from s3tensor.errors import PatternError
from s3tensor.pattern.layout import LARGEST, Layout, as_int, as_ints, coalesce
from s3tensor.pattern.view_rule import LONGEST
from s3tensor.pattern.view_rule import ViewRule as ViewRule

_INT = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class Pattern:
    """A structured-sparsity pattern, without a shape.

    Args:
        view: rule in einops words that splits and permutes the weight's dims; ``None`` is the identity.
        sizes: sizes of named axes of the rule; at most one axis of each group may be left out.
        block: shape of the unit that is kept or pruned together, in view elements; -1 is the whole dim.
        scope: shape of the set of blocks that compete, **in blocks**; -1 is the whole dim.
        keep: blocks kept in each scope of n, as a count (int), or as a density d in (0, 1] (float),
            rounded half up: ``floor(d * n + 0.5)``. ``1`` is one block, ``1.0`` is all of them.

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
    name: str = field(default="", init=False, compare=False, repr=False)  # the preset's spelling
    by_density: bool = field(default=False, init=False, repr=False)  # keep=1.0, unlike keep=1

    def __post_init__(self) -> None:
        if self.view is not None:  # one spelling for one rule
            object.__setattr__(self, "view", str(_parse_rule(self.view)))
        object.__setattr__(self, "sizes", self._checked_sizes())
        self._check_tiles()
        self._check_fit()
        self._check_keep()

    def _checked_sizes(self) -> tuple[tuple[str, int], ...]:
        inputs = _parse_rule(self.view).inputs if self.view is not None else ()
        axes = {name for group in inputs for name in group}
        sizes: dict[str, int] = {}
        given: Any = self.sizes.items() if isinstance(self.sizes, Mapping) else self.sizes
        try:
            pairs: list[tuple[str, int]] = [(name, size) for name, size in given]
        except (TypeError, ValueError):
            raise PatternError(
                f"sizes must map axis names to sizes, as in {{'h': 2}}, got {self.sizes!r:.80}"
            ) from None
        for name, size in pairs:
            if not isinstance(name, str) or name not in axes:
                raise PatternError(
                    f"sizes names {name!r:.80}, which view rule {self.view or 'identity'!r} does not have"
                )
            if name in sizes:
                raise PatternError(f"sizes gives axis {name!r} twice")
            (sizes[name],) = as_ints(f"size of axis {name!r}", (size,), 1)
        for group in inputs:
            unknown = [name for name in group if name not in sizes]
            if len(unknown) > 1:
                raise PatternError(
                    f"view rule {self.view!r} leaves {unknown} of one group open; give all but one of "
                    "them in sizes"
                )
        return tuple(sorted(sizes.items()))

    def _check_tiles(self) -> None:
        for what in ("block", "scope"):
            values = as_ints(what, getattr(self, what), -1)
            if 0 in values or not values:
                raise PatternError(
                    f"{what} {values} must hold an int >= 1, or -1 for the whole dim, for each view dim"
                )
            object.__setattr__(self, what, values)
        ndim = len(self.rule.outputs)
        if len(self.block) != ndim or len(self.scope) != ndim:
            raise PatternError(
                f"block {self.block} and scope {self.scope} need one entry for each of the {ndim} dims "
                f"of the view {self.view or 'identity'!r}"
            )

    def _check_fit(self) -> None:
        sizes = dict(self.sizes)
        for axis, block, scope in zip(self.rule.outputs, self.block, self.scope, strict=True):
            if block == -1 and scope not in (1, -1):
                raise PatternError(
                    f"block {self.block} spans a whole dim of which scope {self.scope} wants {scope} "
                    "blocks; there is only one, so make that entry of scope 1 or -1"
                )
            if sizes.get(axis, 0) % _tile(block, scope):
                raise PatternError(
                    f"axis {axis!r} has size {sizes[axis]}, not a multiple of {_tile(block, scope)} "
                    f"(block {block}, scope {scope}); make the two agree"
                )

    def _check_keep(self) -> None:
        whole = as_int(self.keep)
        if whole is not None:
            (count,) = as_ints("keep", (whole,), -(2**63))
            blocks = math.prod(self.scope) if -1 not in self.scope else None
            if count < 1 or (blocks is not None and count > blocks):
                raise PatternError(
                    f"keep={count} of a scope of {blocks or 'n'} blocks; a count must be from 1 to "
                    f"{blocks or 'the number of blocks in a scope'}"
                )
            object.__setattr__(self, "keep", count)
        elif isinstance(self.keep, float) and 0.0 < self.keep <= 1.0:
            object.__setattr__(
                self, "keep", float(self.keep)
            )  # a numpy float would not print as one
            object.__setattr__(self, "by_density", True)
        else:
            raise PatternError(
                f"keep={self.keep!r:.80} must be a count of blocks (int >= 1) or a density (float in "
                "(0, 1])"
            )

    # It is immutable, so a copy is itself, and equal patterns are mostly one object: torch.compile compares
    # the pattern of each weight on each call, and by identity that is quick.

    def __copy__(self) -> Pattern:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Pattern:
        return self

    @property
    def rule(self) -> ViewRule:
        """The parsed view rule, also of the identity."""
        return ViewRule.identity(len(self.block)) if self.view is None else _parse_rule(self.view)

    @staticmethod
    def parse(text: str | Pattern) -> Pattern:
        """Pattern from its string: a preset such as ``2:4``, or its parts, ``block=1,2; scope=1,4; keep=2``.

        Raises:
            PatternError: with the whole grammar, when the string is neither.
        """
        if isinstance(text, Pattern):
            return text
        if not isinstance(text, str):
            raise PatternError(f"a pattern is a Pattern or a string, got {type(text).__name__}")
        if len(text) > LONGEST:
            raise PatternError(f"a pattern of {len(text)} characters; at most {LONGEST} are read")
        return _parse(text)

    @property
    def parts(self) -> str:
        """The pattern spelled out, free of presets.

        ``Pattern.parse(p.parts) == p``, also where a preset of that name means something else.
        """
        fields = []
        if self.view is not None:
            fields.append(f"view={self.view}")
        sizes: dict[str, int] = dict(self.sizes)
        if sizes:
            fields.append("sizes=" + ",".join(f"{name}:{size}" for name, size in sizes.items()))
        fields.append("block=" + ",".join(map(str, self.block)))
        fields.append("scope=" + ",".join(map(str, self.scope)))
        fields.append(f"keep={self.keep!r}")
        return "; ".join(fields)

    def __str__(self) -> str:
        return self.name or self.parts

    def after(
        self, rule: str, sizes: Mapping[str, int] | tuple[tuple[str, int], ...] = ()
    ) -> Pattern:
        """This pattern on a view of the weight: ``rule`` first, then the pattern's own view.

        Args:
            rule: rule in einops words; its view has the dims that this pattern is for.
            sizes: sizes of named axes of ``rule``.

        Example:
            >>> down_the_columns = Pattern.parse("2:4").after("m k -> k m")
            >>> str(down_the_columns.bind((8, 16)).view)
            '(16,8):(1,16)'

        Raises:
            PatternError: when the rule does not parse, or its view has other dims or sizes than this
                pattern takes.
        """
        single = (1,) * len(_parse_rule(rule).outputs)
        first = Pattern(rule, sizes, block=single, scope=single, keep=1)
        try:
            view, merged = first.rule.then(self.rule, dict(first.sizes), dict(self.sizes))
        except PatternError as error:
            raise PatternError(f"{self} cannot follow view rule {rule!r}: {error}") from None
        return Pattern(str(view), merged, self.block, self.scope, self.keep)

    def step(self, dim: int) -> tuple[int, bool]:
        """``(step, is_open)``: dim ``dim`` of a weight that fits is a multiple of ``step``.

        Where ``is_open`` is False it is ``step`` itself: every axis of that dim has a given size.
        """
        sizes: dict[str, int] = dict(self.sizes)
        places = zip(self.rule.outputs, self.block, self.scope, strict=True)
        tiles = {name: _tile(block, scope) for name, block, scope in places}
        group = self.rule.inputs[dim]
        return math.prod(sizes.get(name, tiles[name]) for name in group), not sizes.keys() >= {
            *group
        }

    def bind(self, shape: tuple[int, ...]) -> BoundPattern:
        """This pattern on a weight of ``shape``. The same inputs give the same, cached object.

        Raises:
            PatternError: naming the dim, the sizes and the remedy, when the pattern does not fit.
        """
        return _bind(self, self.name, as_ints("weight shape", shape, 0))


@dataclass(frozen=True)
class BoundPattern:
    """A pattern on a contiguous weight of one shape. Made by :meth:`Pattern.bind`.

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
    def levels(self) -> tuple[Layout, Layout, Layout]:
        """Offsets of the scopes, of the blocks in a scope and of the elements in a block, by view dim."""
        blocks, elements = self.view.divide(self.block)
        scopes, competing = blocks.divide(self.scope)
        return scopes, competing, elements

    @cached_property
    def tiles(self) -> Layout:
        """The view as ``scope_grid + scope + block`` modes: offset of element e of block b of scope s."""
        scopes, competing, elements = self.levels
        return Layout(
            scopes.shape + competing.shape + elements.shape,
            scopes.stride + competing.stride + elements.stride,
        )

    @cached_property
    def normal_form(self) -> tuple[Layout, Layout, Layout]:
        """``levels`` as functions of the number of a scope, block and element, in the fewest modes.

        Patterns of one ``keep`` on one shape pack to the same bytes when these are equal.
        """
        scopes, competing, elements = (coalesce(level.reversed()) for level in self.levels)
        return scopes, competing, elements

    @cached_property
    def is_sequential(self) -> bool:
        """Whether memory holds scope after scope, and each of them block after block."""
        return coalesce(self.tiles.reversed()).rank == 1

    @cached_property
    def n_of_m(self) -> tuple[int, int] | None:
        """``(keep, M)`` where M single weights, next to each other in memory, form a scope; else None."""
        competing, m = self.normal_form[1], self.blocks_per_scope
        run = self.block_size == 1 and competing.rank == 1 and competing.cosize == m
        return (self.keep, m) if run else None

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
        """Rows (dim 0) in the smallest group that no scope crosses and that the view rule can split off.

        Rows can be pruned in chunks of whole groups: each chunk is the same pattern on fewer rows.
        """
        row = math.prod(self.shape[1:])
        step, _ = self.pattern.step(0)
        # On fewer rows only the axis without a given size is shorter. It must be the slowest of its group:
        # a faster one would change the stride of the axes before it.
        sizes: dict[str, int] = dict(self.pattern.sizes)
        slowest = next((name for name in self.pattern.rule.inputs[0] if sizes.get(name) != 1), None)
        if slowest is None or slowest in sizes:
            return self.shape[0]
        # Strides nest, so the widest span is a multiple of the others.
        widest = 1
        for stride, block, scope in zip(self.view.stride, self.block, self.scope, strict=True):
            if stride >= row and block * scope > 1:
                widest = max(widest, stride // row * block * scope)
        return math.lcm(widest, step)

    @cached_property
    def index_code(self) -> Literal["none", "index", "bitmap"]:
        """How kept blocks are recorded: not at all when all are kept, else by the smaller of two codes."""
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
    def scope_bits(self) -> int:
        """Bits that record the kept blocks of one scope."""
        if self.index_code == "none":
            return 0
        return self.keep * self.index_bits if self.index_code == "index" else self.blocks_per_scope

    @cached_property
    def index_bytes(self) -> int:
        """Bytes of the packed indices of the whole weight."""
        return -(-self.scopes * self.scope_bits // 8)

    def packed_bytes(self, itemsize: int) -> int:
        """Bytes of the packed weight, values and indices, with values of ``itemsize`` bytes."""
        return math.prod(self.packed_shape) * itemsize + self.index_bytes

    def __str__(self) -> str:
        return f"{self.pattern} on {'x'.join(map(str, self.shape))}"


Preset = Callable[..., Pattern]
_PRESETS: dict[str, tuple[re.Pattern[str], str, Preset]] = {}


def preset(syntax: str, regex: str, meaning: str) -> Callable[[Preset], Preset]:
    """Register a named pattern: the groups of ``regex`` are the arguments of the decorated function.

    ``syntax`` and ``meaning`` are its line of :func:`grammar`, which a string that does not parse is told.
    """

    def register(build: Preset) -> Preset:
        _PRESETS[syntax] = (re.compile(regex), meaning, build)
        _parse.cache_clear()
        _bind_text.cache_clear()
        return build

    return register


def grammar() -> str:
    """Every way to write a pattern, one a line."""
    width = max(map(len, _PRESETS), default=0)
    named = [f"  {syntax:<{width}}  {meaning}" for syntax, (_, meaning, _) in _PRESETS.items()]
    return "\n".join(
        (
            *named,
            "  where #K in place of @D is a count, and /tensor after block, unstructured and kernel lets the "
            "whole weight compete",
            "  view=RULE; sizes=AXIS:N,...; block=...; scope=...; keep=N|DENSITY",
            f"  {'':<{width}}  any pattern by its parts; view and sizes may be left out, -1 is a whole dim",
        )
    )


@functools.lru_cache(maxsize=256)
def _parse(text: str) -> Pattern:
    word = text.strip()
    for regex, _, build in _PRESETS.values():
        match = regex.fullmatch(word)
        if match:
            made = dataclasses.replace(build(*match.groups()))
            object.__setattr__(made, "name", word)
            return made
    if "=" in word:
        return _parse_parts(word)
    raise PatternError(f"unknown pattern {text!r}; a pattern is one of\n{grammar()}")


def _parse_parts(text: str) -> Pattern:
    parts: dict[str, str] = {}
    for item in text.split(";"):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or key not in ("view", "sizes", "block", "scope", "keep") or key in parts:
            raise PatternError(
                f"cannot read {item.strip()!r} in {text!r}; a pattern is one of\n{grammar()}"
            )
        parts[key] = value
    missing = [key for key in ("block", "scope", "keep") if key not in parts]
    if missing:
        raise PatternError(
            f"pattern {text!r} lacks {missing[0]!r}; a pattern is one of\n{grammar()}"
        )
    try:
        pairs = [pair.split(":") for pair in parts.get("sizes", "").split(",") if pair.strip()]
        sizes = tuple((name.strip(), int(size)) for name, size in pairs)
        block = tuple(int(n) for n in parts["block"].split(","))
        scope = tuple(int(n) for n in parts["scope"].split(","))
        keep = int(parts["keep"]) if _INT.fullmatch(parts["keep"]) else float(parts["keep"])
    except ValueError as error:
        raise PatternError(f"cannot read the numbers of {text!r} ({error})") from None
    return Pattern(parts.get("view"), sizes, block, scope, keep)


@functools.lru_cache(maxsize=256)
def _parse_rule(text: str) -> ViewRule:
    return ViewRule.parse(text)


@functools.lru_cache(maxsize=1024)
def _bind(pattern: Pattern, name: str, shape: tuple[int, ...]) -> BoundPattern:
    del name  # a key of the cache, so that the pattern comes back in the caller's spelling
    if math.prod(shape) > LARGEST:
        raise PatternError(
            f"{pattern} cannot be bound to shape {shape}: more than 2**63 - 1 elements, the largest size "
            "of a tensor"
        )
    view = _view(pattern, shape)
    block = tuple(n if b == -1 else b for n, b in zip(view.shape, pattern.block, strict=True))
    grid = tuple(n // b for n, b in zip(view.shape, block, strict=True))
    scope = tuple(n if s == -1 else s for n, s in zip(grid, pattern.scope, strict=True))
    blocks = math.prod(scope)
    keep = math.floor(pattern.keep * blocks + 0.5) if pattern.by_density else int(pattern.keep)
    if not 1 <= keep <= blocks:
        raise PatternError(
            f"{pattern} keeps {keep} of the {blocks} blocks of a scope on a weight of shape {shape}; it "
            f"must keep from 1 to {blocks}: choose another keep or density, or a wider scope"
        )
    return BoundPattern(pattern, shape, view, block, scope, keep)


def bind(text: str, shape: Sequence[int]) -> BoundPattern:
    """``Pattern.parse(text).bind(shape)``, cached by the text: for operators, whose pattern is a string.

    Raises:
        PatternError: a string that is not a pattern, or a pattern that does not fit the shape.
    """
    return _bind_text(text, tuple(int(n) for n in shape))


@functools.lru_cache(maxsize=1024)
def _bind_text(text: str, shape: tuple[int, ...]) -> BoundPattern:
    return Pattern.parse(text).bind(shape)


def _view(pattern: Pattern, shape: tuple[int, ...]) -> Layout:
    """The view's layout: the axes of each dim, nested, in the order of the rule's right side."""
    inputs = pattern.rule.inputs
    if len(shape) != len(inputs):
        raise PatternError(
            f"{pattern} is a pattern of {len(inputs)}-dim weights, got shape {shape} of {len(shape)} "
            "dims; reshape the weight or choose another pattern"
        )
    if 0 in shape:
        raise PatternError(
            f"{pattern} cannot be bound to the empty shape {shape}; every dim must be >= 1"
        )
    sizes = dict(pattern.sizes)
    for dim, group in enumerate(inputs):
        _check_dim(pattern, shape, dim)
        rest = shape[dim] // math.prod(sizes.get(name, 1) for name in group)
        sizes |= {name: rest for name in group if name not in sizes}  # at most one of a group
    return pattern.rule.layout(sizes, Layout.row_major(shape).stride)


def _check_dim(pattern: Pattern, shape: tuple[int, ...], dim: int) -> None:
    """Refuse a dim of a weight that the pattern does not divide."""
    n = shape[dim]
    step, is_open = pattern.step(dim)
    if n == step or (is_open and n % step == 0):
        return
    failure = f"{pattern} does not fit a weight of shape {shape}: dim {dim} has {n} elements, not "
    factors = " x ".join(_tile_words(pattern, name) for name in pattern.rule.inputs[dim])
    if not is_open:
        raise PatternError(
            f"{failure}{step} ({factors}); leave one of these axes out of sizes so that it follows the "
            "weight, choose another pattern, or leave this weight dense"
        )
    raise PatternError(
        f"{failure}a multiple of {step} ({factors}); pad dim {dim} to {-(-n // step) * step}, choose "
        "another pattern, or leave this weight dense"
    )


def _tile_words(pattern: Pattern, axis: str) -> str:
    """Why an axis needs its size, for an error message."""
    size = dict(pattern.sizes).get(axis)
    if size is not None:
        return f"axis {axis}={size}"
    place = pattern.rule.outputs.index(axis)
    block, scope = pattern.block[place], pattern.scope[place]
    words = f"block {block}" if scope in (1, -1) else f"block {block} x scope {scope}"
    if pattern.view is None:
        return words
    return f"axis {axis}" if _tile(block, scope) == 1 else f"axis {axis} in {words}"


def _tile(block: int, scope: int) -> int:
    """Elements of a view dim that a scope of blocks needs; -1 takes what there is."""
    return 1 if block == -1 else block if scope == -1 else block * scope
