"""For tests: Hypothesis strategies of patterns, shapes and weights, and the contract of a pattern.

Needs ``hypothesis``. A new preset is tested once its name is in ``PRESETS``, or in ``CONV_PRESETS``.
"""

from __future__ import annotations

import math
import pickle

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.mask.packing import check_packed, pack, unpack, unpack_mask
from s3tensor.mask.projection import project, satisfies, tile, untile
from s3tensor.pattern import BoundPattern, Pattern

PRESETS = (  # on weights of 32 rows and 240 columns, among others
    "2:4",
    "1:3",
    "5:8",
    "4:4",
    "pair4:8",
    "coupled2:4",
    "rowpair16",
    "block:4x2@0.5",
    "block:4x2@0.25/tensor",
    "block:2x1@2:4",
    "unstructured@0.3",
    "unstructured#2",
    "unstructured@0.3/tensor",
    "row@0.5",
    "column@0.25",
    "head:4@0.5",
    "head:4x2#2",
    "head:2@0.5/group:2",
    "head:4@0.5/input",
)
CONV_PRESETS = (  # on weights of (out_channels, in_channels, height, width)
    "conv2:4",
    "filter@0.5",
    "channel@0.5",
    "kernel@0.3",
    "kernel#2/tensor",
)

# Values that break careless code: ties, both zeros, adjacent floats, and squares that over- or underflow.
_AWKWARD = (0.0, -0.0, 1.0, -1.0, 1.0000001, 0.5, 3.0, -3.0, 1e-3, 1e-30, -1e-38, 1e30, -3e38)


@st.composite
def patterns(draw: st.DrawFn, max_ndim: int = 3) -> Pattern:
    """Any pattern on weights of 1 to ``max_ndim`` dims: split, permuted, with whole dims and densities."""
    if draw(st.booleans()):
        ndim = draw(st.integers(1, max_ndim))
        inputs = [[f"d{dim}"] for dim in range(ndim)]
        view, sizes, outputs = None, {}, [group[0] for group in inputs]
    else:
        splits = draw(st.lists(st.integers(1, 3), min_size=1, max_size=max_ndim))
        inputs = [[f"a{dim}{part}" for part in range(n)] for dim, n in enumerate(splits)]
        sizes = {name: draw(st.sampled_from((1, 2, 3, 4, 8))) for group in inputs for name in group}
        for group in inputs:
            left_open = draw(st.sampled_from((*group, "")))
            sizes.pop(left_open, None)
        outputs = draw(st.permutations([name for group in inputs for name in group]))
        left = " ".join(f"({' '.join(group)})" for group in inputs)
        view = f"{left} -> {' '.join(outputs)}"
    block, scope = [], []
    for name in outputs:
        size = sizes.get(name, 8)
        block.append(draw(st.sampled_from([n for n in (1, 2, 4, size, -1) if size % n == 0])))
        rest = 1 if block[-1] == -1 else size // block[-1]
        scope.append(draw(st.sampled_from([n for n in (1, 2, 4, rest, -1) if rest % n == 0])))
    most = math.prod(scope) if -1 not in scope else 1
    keep = draw(
        st.integers(1, most)
        | st.sampled_from((0.1, 0.25, 0.5, 0.75, 1.0))
        | st.floats(0, 1, exclude_min=True)
    )
    return Pattern(view, sizes, tuple(block), tuple(scope), keep)


@st.composite
def shapes(draw: st.DrawFn, pattern: Pattern, max_steps: int = 6) -> tuple[int, ...]:
    """A weight shape that ``pattern`` divides: up to ``max_steps`` times the smallest in each dim."""
    shape = []
    for dim in range(len(pattern.rule.inputs)):
        step, is_open = pattern.step(dim)
        shape.append(step * draw(st.integers(1, max_steps)) if is_open else step)
    return tuple(shape)


@st.composite
def bound_patterns(draw: st.DrawFn, max_elements: int = 4096) -> BoundPattern:
    """Any pattern or preset, of matrices or convolutions, on a weight shape that it fits."""
    named = st.sampled_from((*PRESETS, *CONV_PRESETS)).map(Pattern.parse)
    pattern = draw(named | patterns())
    shape = draw(shapes(pattern))
    assume(math.prod(shape) <= max_elements)
    try:
        return pattern.bind(shape)
    except PatternError:  # a density that rounds to no block, or a count above the blocks there are
        assume(False)
        raise


@st.composite
def weights(
    draw: st.DrawFn,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Tensor:
    """A finite tensor of ``shape``: normal, awkward (ties, -0.0, tiny, huge), or of a few values only."""
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("normal", "awkward", "few")))
    if kind == "normal":
        return torch.randn(shape, generator=generator).to(dtype)
    limit = torch.finfo(dtype).max
    pool = (
        _AWKWARD
        if kind == "awkward"
        else draw(st.lists(st.sampled_from(_AWKWARD), min_size=1, max_size=3))
    )
    values = torch.tensor(pool, dtype=torch.float64).clamp(-limit, limit).to(dtype)
    return values[torch.randint(len(values), shape, generator=generator)]


def assert_contract(pattern: Pattern | str, shape: tuple[int, ...], seed: int = 0) -> None:
    """Check the laws that every pattern keeps, on one weight of ``shape``.

    Raises:
        AssertionError: naming the first law that does not hold.
        PatternError: when the pattern does not fit the shape.
    """
    pattern = Pattern.parse(pattern)
    bound = pattern.bind(shape)
    _assert_value(pattern)
    assert bound is pattern.bind(torch.Size(shape)), "bind gives one object for the same inputs"
    assert bound.view.is_compact, "the view reads every weight once"
    assert math.prod(shape) == bound.scopes * bound.blocks_per_scope * bound.block_size, (
        "tiles fill the weight"
    )

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    offsets = torch.arange(weight.numel()).reshape(shape)
    assert tile(offsets, bound).flatten().tolist() == bound.tiles.offsets(), (
        "tile reads the layout's offsets"
    )
    assert torch.equal(untile(tile(weight, bound), bound), weight), "untile undoes tile"

    mask = project(weight, pattern)
    kept = tile(mask, bound)
    assert torch.equal(kept.all(-1), kept.any(-1)), "a block is kept or pruned as a whole"
    assert bool((kept.any(-1).sum(-1) == bound.keep).all()), "every scope keeps its budget"
    assert torch.equal(project(weight * mask, pattern), mask), "projection is idempotent"
    assert satisfies(weight * mask, pattern), "a projected weight satisfies its pattern"

    values, indices = pack(weight, mask, bound)
    check_packed(values, indices, bound)
    assert torch.equal(unpack(values, indices, bound), weight * mask), "unpack undoes pack"
    assert torch.equal(unpack_mask(indices, bound), mask), "indices record the mask"
    stored = values.nbytes + indices.nbytes
    assert stored == bound.packed_bytes(weight.element_size()), "packed_bytes counts every byte"

    period = bound.row_period
    assert shape[0] % period == 0, "rows are whole groups"
    for start in range(0, shape[0], period):
        rows = slice(start, start + period)
        assert torch.equal(project(weight[rows], pattern), mask[rows]), (
            "no scope crosses a group of rows"
        )


def _assert_value(pattern: Pattern) -> None:
    for text in (str(pattern), pattern.parts):
        assert Pattern.parse(text) == pattern, f"{text!r} reads back as the pattern it came from"
        assert hash(Pattern.parse(text)) == hash(pattern), "equal patterns have equal hashes"
    assert pickle.loads(pickle.dumps(pattern)) == pattern, "a pattern survives pickling"
