"""Tables of measured times, and the choice of a path that follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from s3tensor.pattern import Pattern
from s3tensor.tensor import cusparselt, timings
from s3tensor.tensor import linear as paths
from s3tensor.tensor.timings import Cell, Timings

NAMES = ("dense", "packed", "scratch", "vendor")
times = st.floats(0.5, 1e5)
CUDA = torch.device("cuda", 0)


@st.composite
def tables(draw: st.DrawFn) -> Timings:
    cells = []
    for rows, columns in draw(st.sets(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1)):
        for batch in draw(st.sets(st.integers(1, 5000), min_size=1, max_size=4)):
            us = draw(st.dictionaries(st.sampled_from(NAMES), times, min_size=1))
            plan = draw(st.tuples(*[st.integers(-1, 9)] * 3))
            cells.append(Cell("2:4", "bfloat16", 64 * rows, 64 * columns, batch, us, plan))
    return Timings("Some GPU", (9, 0), tuple(cells), draw(times))


@given(tables())
def test_a_table_survives_its_file(table: Timings) -> None:
    text = table.to_json(versions={"torch": "2"}, date="2026-01-01")
    again = Timings.from_json(text)
    assert json.loads(text)["versions"] == {"torch": "2"}
    assert (again.device, again.capability) == (table.device, table.capability)
    for ours, theirs in zip(table.cells, again.cells, strict=True):
        assert {**vars(theirs), "us": {}} == {**vars(ours), "us": {}}
        assert theirs.us == {name: round(us, 2) for name, us in ours.us.items()}


@given(tables())
def test_what_was_measured_is_predicted_exactly(table: Timings) -> None:
    for cell in table.cells:
        found = table.times(cell.pattern, cell.dtype, cell.rows, cell.columns, cell.batch)
        assert found == cell.us
        if "vendor" in cell.us:
            plan = table.cusparselt_plan(
                cell.pattern, cell.dtype, cell.rows, cell.columns, cell.batch
            )
            assert plan == cell.vendor


@given(tables(), st.integers(1, 9000))
def test_a_prediction_lies_between_its_neighbours(table: Timings, batch: int) -> None:
    cell = table.cells[0]
    same = [c for c in table.cells if (c.rows, c.columns) == (cell.rows, cell.columns)]
    found = table.times("2:4", "bfloat16", cell.rows, cell.columns, batch)
    assert found is not None
    for path, us in found.items():
        measured = [c.us[path] for c in same if path in c.us]
        assert min(measured) * (1 - 1e-9) <= us <= max(measured) * (1 + 1e-9)


def test_between_two_batches_times_are_linear_in_logarithms_and_outside_constant() -> None:
    cells = [Cell("2:4", "bfloat16", 64, 64, n, {"dense": us}) for n, us in ((4, 1.0), (64, 16.0))]
    table = Timings("GPU", (9, 0), tuple(cells))
    for batch, us in ((1, 1.0), (4, 1.0), (8, 2.0), (16, 4.0), (64, 16.0), (4096, 16.0)):
        found = table.times("2:4", "bfloat16", 64, 64, batch)
        assert found is not None and math.isclose(found["dense"], us)


def test_the_nearest_shape_counts_and_other_patterns_are_unknown() -> None:
    cells = [Cell("2:4", "bfloat16", n, n, 1, {"dense": float(n)}) for n in (64, 1024)]
    table = Timings("GPU", (9, 0), tuple(cells))
    assert table.times("2:4", "bfloat16", 200, 64, 1) == {"dense": 64.0}
    assert table.times("2:4", "bfloat16", 512, 2048, 1) == {"dense": 1024.0}
    assert table.times("1:4", "bfloat16", 64, 64, 1) is None
    assert table.times("2:4", "float32", 64, 64, 1) is None
    assert table.cusparselt_plan("2:4", "bfloat16", 64, 64, 1) == (0, 1, -1)


def test_plans_of_a_product_are_those_of_the_nearest_ones_each_once() -> None:
    def cell(size: int, batch: int, plan: tuple[int, int, int], pattern: str = "2:4") -> Cell:
        return Cell(pattern, "bfloat16", size, size, batch, {"vendor": 1.0}, plan)

    cells = (
        cell(64, 1024, (3, 1, 1)),
        cell(64, 4096, (4, 1, 1)),
        cell(4096, 4096, (5, 1, 1)),
        cell(2048, 4096, (4, 1, 1)),
        cell(4096, 4096, (9, 1, 1), "coupled2:4"),
        Cell("2:4", "bfloat16", 4096, 4096, 4096, {"dense": 1.0}, (8, 1, 1)),
    )
    table = Timings("GPU", (9, 0), cells)
    assert table.cusparselt_plans(4096, 4096, 9999) == [(5, 1, 1), (4, 1, 1), (3, 1, 1)]
    assert table.cusparselt_plans(64, 64, 100, count=1) == [(3, 1, 1)]
    assert Timings("GPU", (9, 0), ()).cusparselt_plans(64, 64, 1) == []


GOOD = json.loads(
    Timings("GPU", (9, 0), (Cell("2:4", "bfloat16", 4, 4, 1, {"dense": 1.0}),)).to_json()
)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"cells": None},
        {"cells": [{}]},
        {"cells": [{**GOOD["cells"][0], "us": {"dense": -1.0}}]},
        {"cells": [{**GOOD["cells"][0], "us": {"dense": float("nan")}}]},
        {"cells": [{**GOOD["cells"][0], "us": {}}]},
        {"cells": [{**GOOD["cells"][0], "rows": 0}]},
        {"cells": [{**GOOD["cells"][0], "vendor": [1]}]},
        {"capability": [9]},
        {"vendor_call_us": "soon"},
    ],
)
def test_damaged_tables_are_refused(change: dict[str, Any]) -> None:
    assert len(Timings.from_json(json.dumps(GOOD)).cells) == 1
    with pytest.raises(ValueError):
        Timings.from_json(json.dumps({**GOOD, **change}))


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        ),
    )
)
def test_any_other_document_is_refused(document: Any) -> None:
    with pytest.raises(ValueError):
        Timings.from_json(json.dumps(document))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("S3TENSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(timings, "SHIPPED", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    paths.forget()
    yield tmp_path
    monkeypatch.undo()
    paths.forget()


def table(device: str, us: float, capability: tuple[int, int] = (9, 0)) -> Timings:
    return Timings(device, capability, (Cell("2:4", "bfloat16", 4, 4, 1, {"dense": us}),))


def test_a_users_table_comes_before_a_shipped_one_and_that_before_a_relatives(cache: Path) -> None:
    assert timings.load("NVIDIA X", (9, 0)) is None
    relative = table("NVIDIA Y", 1.0)
    (cache / "shipped" / timings.file_name("NVIDIA Y")).write_text(relative.to_json())
    paths.forget()
    assert timings.load("NVIDIA X", (9, 0)) == relative
    assert timings.load("NVIDIA X", (8, 0)) is None
    own = table("NVIDIA X", 2.0)
    (cache / "shipped" / timings.file_name("NVIDIA X")).write_text(own.to_json())
    paths.forget()
    assert timings.load("NVIDIA X", (9, 0)) == own
    users = table("NVIDIA X", 3.0)
    saved = timings.save(users, date="today")
    assert saved.parent == cache / "cache" and json.loads(saved.read_text())["date"] == "today"
    assert timings.load("NVIDIA X", (9, 0)) == users
    assert [file.name for file in saved.parent.iterdir()] == [saved.name]


def test_a_damaged_file_is_passed_over_with_a_warning(cache: Path) -> None:
    own = table("NVIDIA X", 2.0)
    (cache / "shipped" / timings.file_name("NVIDIA X")).write_text(own.to_json())
    timings.save(own).write_text("{")
    with pytest.warns(UserWarning, match="bench --calibrate"):
        assert timings.load("NVIDIA X", (9, 0)) == own


def test_shipped_tables_are_sound() -> None:
    for file in timings.SHIPPED.glob("timings-*.json"):
        read = Timings.from_json(file.read_text(encoding="utf-8"))
        assert file.name == timings.file_name(read.device)
        assert {cell.pattern for cell in read.cells} >= {
            "2:4",
            "pair4:8",
            "coupled2:4",
            "rowpair16",
        }
        assert all({"dense", "scratch"} <= set(cell.us) for cell in read.cells)


@given(st.floats(0.05, 1), st.integers(16, 20000), st.integers(16, 20000), st.integers(1, 8000))
def test_guessed_times_are_positive_and_unpacking_never_beats_dense(
    density: float, rows: int, columns: int, batch: int
) -> None:
    guess = timings.guess(density, rows, columns, batch)
    assert all(us > 0 for us in guess.values())
    assert guess["scratch"] > guess["dense"]


# the choice -------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Timings:
    """A device with a table: packed is best for few rows, vendor for many, dense between."""
    cells = [
        Cell("2:4", "bfloat16", 64, 64, 1, {"packed": 1, "dense": 2, "scratch": 5, "vendor": 9}),
        Cell("2:4", "bfloat16", 64, 64, 128, {"packed": 4, "dense": 3, "scratch": 5, "vendor": 9}),
        Cell(
            "2:4", "bfloat16", 64, 64, 4096, {"dense": 20, "scratch": 23, "vendor": 10}, (7, 2, 1)
        ),
    ]
    made = Timings("GPU", (9, 0), tuple(cells), vendor_call_us=15.0)
    monkeypatch.setattr(timings, "of_device", lambda device: made)
    paths.forget()
    yield made
    monkeypatch.undo()
    paths.forget()


def pick(
    batch: int,
    available: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    graph: bool = True,
    pattern: str = "2:4",
) -> str:
    monkeypatch.setattr(paths, "_possible", lambda kept, batch: list(available))
    paths.forget()
    bound = Pattern.parse(pattern).bind((64, 64))
    kept = paths.Kept(bound, torch.bfloat16, CUDA, True, False, True, True)
    return paths._choose(kept, batch, graph)


def test_the_fastest_available_path_is_chosen(
    measured: Timings, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = ("packed", "dense", "scratch", "vendor")
    found = [pick(n, every, monkeypatch) for n in (1, 128, 4096)]
    assert found == ["packed", "dense", "vendor"]
    assert [pick(n, ("packed", "scratch"), monkeypatch) for n in (1, 128)] == ["packed", "packed"]
    assert pick(4096, ("scratch",), monkeypatch) == "scratch"
    # outside a graph cuSPARSELt costs the host 15 us, which its 10 us on the GPU do not hide
    assert pick(4096, every, monkeypatch, graph=False) == "dense"
    assert cusparselt.plan_of(Pattern.parse("2:4").bind((64, 64)), CUDA, 4096) == (7, 2, 1)


def test_a_pattern_without_a_table_is_chosen_for_by_its_bytes(
    measured: Timings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pick(4, ("scratch",), monkeypatch, pattern="1:4") == "scratch"
    assert pick(4, ("scratch", "dense"), monkeypatch, pattern="1:4") == "dense"
    assert pick(4, ("scratch", "dense", "general"), monkeypatch, pattern="1:4") == "general"
    assert pick(64, ("scratch", "dense", "general"), monkeypatch, pattern="1:4") == "dense"


def test_only_copies_that_pay_are_kept(measured: Timings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "prefers_tiles", lambda *_: True)
    monkeypatch.setattr(
        paths, "_possible", lambda kept, n: ["scratch", *(["packed"] if n <= 128 else [])]
    )
    monkeypatch.setattr(cusparselt, "takes", lambda *_: True)
    bound = Pattern.parse("2:4").bind((64, 64))

    def keep(first: int, last: int) -> tuple[bool, bool]:
        return paths.worth_keeping(bound, torch.bfloat16, CUDA, (first, last))

    assert keep(1, 1) == (False, False)
    assert keep(1, 128) == (True, False)
    assert keep(4096, 4096) == (True, True)
    assert paths.worth_keeping(bound, torch.bfloat16, torch.device("cpu"), (1, 1)) == (True, False)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("2:4", "2:4"),
        ("block=1,1; scope=1,4; keep=2", "2:4"),
        ("block=1,1; scope=1,4; keep=0.5", "2:4"),
        ("1:4", None),
        ("4:8", None),
        ("pair4:8", "pair4:8"),
        ("rowpair16", "rowpair16"),
    ],
)
def test_forms_are_found_by_meaning(text: str, form: str | None) -> None:
    assert paths.form_of(Pattern.parse(text).bind((64, 64))) == form


@pytest.mark.parametrize(
    ("text", "tile"),
    [
        ("block:16x16@0.5", (16, 16)),
        ("block:4x8@0.25", (4, 8)),
        ("block:16x16@0.5/tensor", None),
        ("rowpair16", None),
        ("2:4", None),
        ("block=4,8; scope=2,8; keep=3", None),
    ],
)
def test_rows_of_blocks_are_found(text: str, tile: tuple[int, int] | None) -> None:
    assert paths.blocks_of(Pattern.parse(text).bind((64, 64))) == tile
