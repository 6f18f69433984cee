"""``bench/solver_time.py``: its phases are those of the solver, and its model of cost fits one."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

admm_module = importlib.import_module("s3tensor.prune.admm")  # the function hides it


BENCH = Path(__file__).resolve().parents[2] / "bench"
CPU = torch.device("cpu")
costs = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("solver_time")
    sys.path[:] = before


@settings(max_examples=50)
@given(launches=costs, a=costs, b=costs)
def test_the_fit_finds_the_model_that_made_the_times(
    script: ModuleType, launches: float, a: float, b: float
) -> None:
    made = {"launches": launches * 1e-3 + 1e-6, "a": a * 1e-13, "b": b * 1e-13}
    shapes = [(192, 576), (3072, 576), (576, 1536), (1536, 1536), (4096, 4096), (512, 4096)]
    solves = [{"M": m, "K": k, "ms": 1e3 * script.estimate(made, (m, k))} for m, k in shapes]
    found = script.fit(solves)
    assert found["relative misfit"] < 1e-6
    for shape in shapes:
        assert script.estimate(found, shape) == pytest.approx(
            script.estimate(made, shape), rel=1e-5
        )


def test_the_phases_of_a_solve_add_up_and_the_solver_is_left_as_it_was(script: ModuleType) -> None:
    before = admm_module.select, admm_module.block_scale, admm_module._Rows.round
    row = script.solve((32, 64), "2:4", CPU, 1)
    assert (admm_module.select, admm_module.block_scale, admm_module._Rows.round) == before
    phases = {name: value for name, value in row.items() if name not in ("ms", "rounds")}
    assert row["rounds"] >= 2 and all(value >= 0 for value in phases.values())
    assert phases["inverses"] > 0 and phases["products"] > 0 and phases["refit"] > 0


def test_a_run_stores_every_part(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "solver_time.json"
    arguments = ["--quick", "--device", "cpu", "--widths", "96", "192", "--store", str(store)]
    monkeypatch.setattr(sys, "argv", ["solver_time.py", *arguments])
    monkeypatch.setattr(script, "SINGLE", {})
    small = {"q+k+v": (960, 576), "down": (576, 768)}
    monkeypatch.setattr(script, "MODELS", {"SmolLM2-135M": (30, small)})
    script.main()
    stored = json.loads(store.read_text(encoding="utf-8"))
    assert [row["K"] for row in stored["inverses"]] == [16, 32]
    assert {(row["M"], row["K"]) for row in stored["solves"]} >= {(160, 96), (96, 128), (32, 32)}
    parts = stored["models"]["SmolLM2-135M"]["a layer"]
    assert set(parts) == set(small)
    assert stored["models"]["SmolLM2-135M"]["seconds"] == pytest.approx(30 * sum(parts.values()))
