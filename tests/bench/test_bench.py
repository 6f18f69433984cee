"""``s3tensor bench``: what it measures is what a user runs, and its tables are used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import s3tensor as s3
from s3tensor import benchmark, cli
from s3tensor.tensor import linear as paths
from s3tensor.tensor import timings

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CliRunner:
    monkeypatch.setenv("S3TENSOR_CACHE", str(tmp_path / "cache"))
    return CliRunner()


SMALL = ["--device", "cpu", "--shape", "32x64", "--batch", "3", "--batch", "1"]


def test_bench_prints_a_table_with_a_row_for_each_product(run: CliRunner) -> None:
    found = run.invoke(cli.main, ["bench", *SMALL, "--pattern", "2:4", "--pattern", "rowpair16"])
    assert found.exit_code == 0, found.output
    lines = [line.split() for line in found.stdout.splitlines()]
    rows = [line for line in lines if "32x64" in line]
    assert [(row[0], row[2]) for row in rows] == [
        *(("2:4", "1"), ("2:4", "3")),
        *(("rowpair16", "1"), ("rowpair16", "3")),
    ]


def test_bench_writes_what_it_measured_as_json(run: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    found = run.invoke(cli.main, ["bench", *SMALL, "--json", "--out", str(file)])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record == json.loads(file.read_text())
    assert torch.__version__.startswith(record["versions"]["torch"]) and record["date"]
    for row, batch in zip(record["rows"], (1, 3), strict=True):
        assert (row["pattern"], row["rows"], row["columns"], row["batch"]) == ("2:4", 32, 64, batch)
        assert min(row["dense_us"], row["lean_us"], row["fast_us"]) > 0
        assert (row["lean_path"], row["fast_path"]) == ("scratch", "dense")
        assert row["dense_bytes"] == 32 * 64 * 4
        assert row["lean_bytes"] == row["dense_bytes"] * 17 // 32
        assert row["fast_bytes"] == row["lean_bytes"] + row["dense_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "2:4", "--shape", "3x6"], "2:4 does not fit"),
        (["--shape", "3x6x4"], "two dims"),
        (["--calibrate"], "CUDA device"),
        (["--batch", "0"], "0"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_bench_refuses_in_one_line(run: CliRunner, arguments: list[str], message: str) -> None:
    found = run.invoke(cli.main, ["bench", "--device", "cpu", *arguments])
    assert found.exit_code == 2 and message in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_a_wrong_product_is_not_timed() -> None:
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    benchmark.check(x @ weight.t(), x, weight, "right")
    with pytest.raises(s3.ModelError, match="wrong, relative error"):
        benchmark.check(x @ weight.t() * 1.001, x, weight, "wrong")


def test_times_are_medians_of_one_call_in_turn() -> None:
    made: list[int] = []
    calls = [lambda i=i: made.append(i) for i in range(3)]
    assert benchmark.microseconds(calls, CPU, 4) > 0
    assert made == [0, 1, 2] * 6  # two rounds to warm up


def test_groups_take_turns() -> None:
    made: list[str] = []
    groups = {name: [lambda name=name: made.append(name)] * 2 for name in "ab"}
    found = benchmark.times(groups, CPU, 1)
    assert set(found) == {"a", "b"} and made == [*"aabb", *"bbaa", *"aabb"]


@pytest.mark.gpu
def test_a_calibrated_device_is_chosen_for_by_its_own_times(
    run: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths.forget()
    batches = ["--batch", "1", "--batch", "256"]
    found = run.invoke(
        cli.main, ["bench", "--calibrate", "--pattern", "2:4", "--shape", "2048x2048", *batches]
    )
    assert found.exit_code == 0, found.output
    (file,) = (tmp_path / "cache").iterdir()
    table = timings.Timings.from_json(file.read_text())
    assert file.name == timings.file_name(torch.cuda.get_device_name())
    key = "2:4", "bfloat16", 2048, 2048
    cells = [c for c in table.cells if (c.pattern, c.dtype, c.rows, c.columns) == key]
    assert [cell.batch for cell in cells] == [1, 256]
    assert all({"dense", "scratch"} <= set(cell.us) for cell in cells)
    assert ["packed" in cell.us for cell in cells] == [True, False]  # it takes up to 128 rows
    weight = benchmark.random_weight("2:4", (2048, 2048), torch.bfloat16, torch.device("cuda", 0))
    for cell in cells:
        lean = {path: us for path, us in cell.us.items() if path in ("packed", "scratch")}
        parts = paths.Weight(weight.packed, weight.indices, weight.bound, tiled=weight.tiled)
        assert paths.choose(parts, cell.batch, graph=True) == min(lean, key=lean.__getitem__)
    row = next(benchmark.rows("2:4", (2048, 2048), [1], torch.bfloat16, torch.device("cuda", 0)))
    assert row.lean_us > 0 and row.torch_us is not None and row.gb_per_s > 0
    monkeypatch.undo()
    paths.forget()
