"""Words and pictures of patterns: what is drawn is what the index maps say, and it can be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s3tensor as s3
from s3tensor import Pattern, PatternError
from s3tensor import draw as viz
from s3tensor.paper import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, View
from s3tensor.pattern import BoundPattern
from s3tensor.testing import CONV_PRESETS, PRESETS, bound_patterns, patterns

pytest.importorskip("matplotlib")


WHOLE = (4096, 4096)  # more cells than any tensor here has


def partition(ids: np.ndarray, index: np.ndarray) -> set[frozenset[int]]:
    """The elements of each id, by row-major index; -1 belongs to none."""
    return {frozenset(index[ids == i].tolist()) for i in {*ids.flat} - {-1}}


def mlp() -> BlockCoupling:
    """Channels of a gated MLP: rows of two weights, columns of a third."""
    gate, up, down = torch.ones(12, 8), torch.ones(12, 8), torch.ones(8, 12)
    return BlockCoupling(
        [BlockSpec(gate, (1, -1), "gate"), BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))],
        [None, None, (1, 0)],
    )


@given(bound_patterns())
def test_a_description_holds_the_figures_of_the_pattern(bound: BoundPattern) -> None:
    text = viz.describe(bound.pattern, bound.shape)
    first, *rest = text.splitlines()
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in rest}
    assert first == str(bound)
    assert list(lines) == ["view", "block", "scope", "scopes", "packed", "fits", "parts"]
    assert Pattern.parse(lines["parts"]) == bound.pattern
    assert str(bound.view) in lines["view"]
    assert f"keeps {bound.keep} of {bound.blocks_per_scope} blocks" in lines["scope"]
    share, values, index = _packed(lines["packed"])
    assert values + index == bound.packed_bytes(2)
    assert share == pytest.approx(bound.packed_bytes(2) / (2 * np.prod(bound.shape)), rel=1e-3)


def _packed(line: str) -> tuple[float, int, int]:
    """Share, bytes of values and bytes of indices in a description."""
    words = line.replace(",", "").split()
    return float(words[0]), int(words[4]), int(words[8])


@pytest.mark.parametrize("name", [*PRESETS, *CONV_PRESETS])
def test_a_preset_is_described_and_drawn_without_a_shape(name: str, tmp_path: Path) -> None:
    assert viz.describe(name).startswith(f"{name} on ")
    viz.save_picture(name, None, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_fits_is_said_of_every_dim() -> None:
    assert "any number of rows, columns in multiples of 4" in viz.describe("2:4")
    assert "any number of filters, channels in multiples of 4, any height" in viz.describe(
        "conv2:4"
    )
    fixed = Pattern("m (t p) -> m t p", {"t": 2, "p": 4}, (1, 1, 1), (1, 1, 4), 2)
    assert "any number of rows, exactly 8 columns" in viz.describe(fixed)
    deep = Pattern(block=(1, 4, 1), scope=(1, 1, 1), keep=1)
    assert "any number of dim 0, dim 1 in multiples of 4, any dim 2" in viz.describe(deep)


@given(patterns())
def test_the_small_shape_fits(pattern: Pattern) -> None:
    try:
        shape = viz.small_shape(pattern)
    except PatternError:
        # Only a budget that no weight of a million elements holds, or that a fixed shape does not.
        assert pattern.by_density or -1 in pattern.scope
        return
    assert pattern.bind(shape).shape == shape


def test_a_budget_that_no_small_weight_holds_is_refused() -> None:
    assert viz.small_shape(Pattern.parse("row#100")) == (128, 256)
    with pytest.raises(PatternError, match="keeps 0 of"):
        viz.describe("unstructured@0.000000001")
    with pytest.raises(PatternError, match="multiple of 4"):
        viz.describe("2:4", (8, 10))


@settings(max_examples=100)
@given(bound_patterns(max_elements=512))
def test_cells_of_one_block_and_one_scope_are_those_of_the_index_map(bound: BoundPattern) -> None:
    (panel,) = viz._panels(bound, None, WHOLE)
    offsets = bound.tiles.offsets()
    assert sorted(panel.index.flat) == sorted(offsets)
    for ids, size in (
        (panel.block, bound.block_size),
        (panel.scope, bound.block_size * bound.blocks_per_scope),
    ):
        expected = {frozenset(offsets[i : i + size]) for i in range(0, len(offsets), size)}
        assert partition(ids, panel.index) == expected
    for block in {*panel.block.flat}:  # one colour and one number a block
        for values in (panel.hue, panel.shade, panel.number):
            assert len({*values[panel.block == block]}) == 1


@given(st.sampled_from(PRESETS), st.data())
def test_neighbours_differ_in_colour(name: str, data: st.DataObject) -> None:
    """Two cells side by side are of one block, or their hue, shade or dark line tells them apart."""
    pattern = Pattern.parse(name)
    (panel,) = viz._panels(pattern, viz.small_shape(pattern))
    rows, columns = panel.block.shape
    row = data.draw(st.integers(0, rows - 1))
    column = data.draw(st.integers(0, columns - 2))
    here, there = (row, column), (row, column + 1)
    same_block = panel.block[here] == panel.block[there]
    colours = [(panel.hue[at], panel.shade[at]) for at in (here, there)]
    assert (colours[0] == colours[1]) == same_block


@given(bound_patterns(max_elements=512))
def test_lines_are_drawn_just_where_ids_change(bound: BoundPattern) -> None:
    ids = viz._panels(bound, None, WHOLE)[0].block
    padded = np.pad(ids, 1, constant_values=-1)
    changes = (padded[1:] != padded[:-1]).sum() + (padded[:, 1:] != padded[:, :-1]).sum()
    lines = viz._edges(ids)
    assert sum(abs(x - u) + abs(y - v) for (x, y), (u, v) in lines) == changes
    covered = np.zeros(ids.shape, dtype=int)
    for row, column, height, width in viz._boxes(ids):
        box = (slice(row, row + height), slice(column, column + width))
        covered[box] += 1
        assert (ids[box] == ids[row, column]).all()
    assert (covered == 1).all()


@given(st.integers(1, 9), st.integers(1, 9), st.randoms(use_true_random=False))
def test_hatches_cover_just_the_pruned_cells(rows: int, columns: int, random: object) -> None:
    cells = np.array([[random.random() < 0.5 for _ in range(columns)] for _ in range(rows)])  # type: ignore[attr-defined]
    covered = np.zeros(cells.shape, dtype=int)
    for (left, top), (right, _), (_, bottom), _ in viz._runs(cells):
        covered[int(top + 0.5) : int(bottom + 0.5), int(left + 0.5) : int(right + 0.5)] += 1
    assert (covered == cells).all()


@settings(max_examples=50)
@given(bound_patterns(max_elements=256))
def test_a_scope_is_drawn_as_its_pattern(bound: BoundPattern) -> None:
    weight = torch.ones(bound.shape)
    view = View.from_rule(weight, str(bound.pattern.rule), dict(bound.pattern.sizes))
    (ours,) = viz._panels(ScopeSpec(BlockSpec(view, bound.block), bound.scope), None)
    (theirs,) = viz._panels(bound, None)
    for part in ("index", "scope", "block", "hue", "shade", "number"):
        assert np.array_equal(getattr(ours, part), getattr(theirs, part))


def test_a_coupling_has_one_number_for_what_is_one_block() -> None:
    gate, up, down = viz._panels(mlp(), None)
    assert np.array_equal(gate.block, up.block) and np.array_equal(gate.block, down.block.T)
    assert np.array_equal(gate.hue, down.hue.T)
    gate, _, down = viz._panels(ScopeSpec(mlp(), (4, 1)), None)
    assert np.array_equal(gate.scope, down.scope.T)
    assert sorted(map(len, partition(gate.scope, gate.index))) == [32, 32, 32]
    assert gate.number[:, 0].tolist() == [0, 1, 2, 3] * 3


def test_coupled_scopes_compete_across_tensors() -> None:
    first = ScopeSpec(BlockSpec(torch.ones(2, 8), (1, 2)), (1, -1))
    second = ScopeSpec(BlockSpec(torch.ones(4, 2), (2, 1)), (-1, 1))
    a, b = viz._panels(ScopeCoupling([first, second], [None, (1, 0)]), None)
    assert a.scope[:, 0].tolist() == [0, 1] and b.scope[0].tolist() == [0, 1]
    assert sorted({*a.number.flatten(), *b.number.flatten()}) == [0, 1, 2, 3, 4, 5]
    assert not {*a.block.flat} & {*b.block.flat}


def test_what_lies_outside_of_a_view_is_left_grey() -> None:
    weight = torch.ones(4, 8)
    view = View(weight, shape=(2, 8), stride=(16, 1))
    (panel,) = viz._panels(BlockSpec(view, (1, 4)), None)
    assert (panel.block[1::2] == -1).all() and (panel.block[::2] >= 0).all()
    picture = pixels(viz.draw_layout(BlockSpec(view, (1, 4))))
    assert (np.ptp(picture[1], axis=-1) == 0).all() and (np.ptp(picture[0], axis=-1) > 0).all()


def pixels(figure: object, panel: int = 0) -> np.ndarray:
    """The colours of cells, (rows, columns, 3)."""
    return np.asarray(figure.axes[panel].get_images()[0].get_array())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["2:4", "coupled2:4", "rowpair16", "block:4x4@0.5", "kernel@0.5"])
def test_pruned_cells_are_pale_and_hatched(name: str) -> None:
    pattern = Pattern.parse(name)
    weight = torch.randn(viz.small_shape(pattern), generator=torch.Generator().manual_seed(0))
    mask = s3.project(weight, pattern)
    figure = viz.draw_layout(pattern, tuple(weight.shape), mask)
    pruned = ~viz._cells(mask.numpy())
    paleness = pixels(figure).min(-1)
    assert paleness[pruned].min() > paleness[~pruned].max()
    hatched = [each for each in figure.axes[0].collections if each.get_hatch()]
    assert sum(len(each.get_paths()) for each in hatched) == len(list(viz._runs(pruned)))
    plain = viz.draw_layout(pattern, tuple(weight.shape))
    assert not [each for each in plain.axes[0].collections if each.get_hatch()]


@pytest.mark.parametrize("shape", [(8, 16), (64, 128), (8, 128), (64, 4)])
def test_cells_are_wide_enough_to_be_told_apart(shape: tuple[int, int]) -> None:
    figure = viz.draw_layout("2:4", shape)
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    assert box.width / shape[1] >= 8 and box.height / shape[0] >= 8  # pixels
    assert figure.get_size_inches().max() <= 13
    edges = figure.axes[0].get_tightbbox()
    assert edges.x0 >= 0 and edges.y0 >= 0
    assert edges.y1 <= figure.bbox.height + 1


def test_of_a_large_weight_the_corner_is_drawn() -> None:
    figure = viz.draw_layout("2:4", (4096, 11008))
    assert "the first 64x128 cells" in figure.axes[0].get_title(loc="left")
    assert pixels(figure).shape == (64, 128, 3)


def test_numbers_are_written_where_they_can_be_read() -> None:
    figure = viz.draw_layout("coupled2:4", (2, 16))
    assert [text.get_text() for text in figure.axes[0].texts] == list("0123") * 8
    assert not viz.draw_layout("2:4", (64, 128)).axes[0].texts


def test_a_coupling_is_drawn_on_axes_of_its_own() -> None:
    figure = viz.draw_layout(mlp())
    assert len(figure.axes) == 3
    assert figure.axes[0].get_title(loc="left").startswith("gate 12x8")
    again = viz.draw_layout(mlp(), ax=[figure.axes[2], figure.axes[1], figure.axes[0]])
    assert again is figure


def test_a_title_takes_the_place_of_the_words() -> None:
    assert viz.draw_layout("2:4", title="kept").axes[0].get_title(loc="left") == "kept"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: viz.draw_layout("2:4", (8, 10)), "multiple of 4"),
        (lambda: viz.draw_layout("2:4", (2, 8), torch.ones(2, 4, dtype=torch.bool)), r"\(2, 8\)"),
        (lambda: viz.draw_layout("2:4", (2, 8), torch.ones(2, 8)), "torch.float32"),
        (lambda: viz.draw_layout("2:4", (2, 8), []), "0 masks for 1 tensors"),
        (lambda: viz.draw_layout(mlp(), ax=[]), "0 axes for 3 tensors"),
        (lambda: viz.draw_layout(mlp(), (4, 4)), "leave shape out"),
        (lambda: viz.draw_layout(Pattern.parse("2:4").bind((2, 8)), (2, 4)), "bound already"),
        (lambda: viz.draw_mask(torch.ones(2, 2)), "torch.float32"),
        (lambda: viz.draw_mask(torch.ones(0, 2, dtype=torch.bool)), r"\(0, 2\)"),
        (lambda: viz.save_picture("2:4", None, "x.txt"), r"x\.txt.*\.png"),
        (lambda: viz.save_picture("2:4", None, "picture"), "picture"),
        (lambda: viz.save_picture("2-4", None, "x.png"), "unknown pattern"),
    ],
    ids=range(12),
)
def test_what_cannot_be_drawn_is_refused_by_name(call: object, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        call()  # type: ignore[operator]


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 32), st.integers(0, 99))
def test_a_mask_is_shown_as_the_kept_share_of_squares(
    rows: int, columns: int, most: int, seed: int
) -> None:
    kept = np.random.default_rng(seed).random((rows, columns)) < 0.4
    share, side = viz._kept_share(kept, most)
    assert max(share.shape) <= most and (side == 1 or max(rows, columns) > most)
    for row, column in np.ndindex(share.shape):
        part = kept[row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert share[row, column] == pytest.approx(part.mean())


def test_the_mask_of_a_layer_is_drawn_whole() -> None:
    mask = s3.project(torch.randn(600, 96), "2:4")
    image = pixels(viz.draw_mask(mask))
    assert image.shape == (300, 48) and image.mean() == pytest.approx(0.5, abs=0.01)
    figure = viz.draw_mask(mask, title="down_proj")
    assert figure.axes[0].get_title(loc="left") == "down_proj"
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    assert box.height / box.width == pytest.approx(600 / 96, rel=0.02)
    assert box.height > 0.7 * figure.bbox.height  # not lost in the figure


def test_a_picture_is_the_same_every_time(tmp_path: Path) -> None:
    mask = s3.project(torch.arange(128.0).reshape(8, 16), "2:4")
    for name in ("a.png", "b.png"):
        viz.save_picture("2:4", (8, 16), tmp_path / name, mask)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_matplotlib_is_imported_by_the_first_picture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, s3tensor; from s3tensor import draw; draw.describe('2:4');"
        "assert not [m for m in sys.modules if m.startswith('matplotlib')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"s3tensor\[viz\]"):
        viz.draw_layout("2:4")
