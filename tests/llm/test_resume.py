"""A run that is broken off goes on from its last whole block, to the same bytes; faults are told clearly."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import s3tensor as s3
from s3tensor import llm
from s3tensor.files import TEMPORARY
from s3tensor.io.state import save_state
from s3tensor.llm import calibrate, run
from s3tensor.llm.resume import RunFolder

transformers = pytest.importorskip("transformers")

from resumable import batches, resumable, tiny  # noqa: E402 - needs transformers


class _Killed(BaseException):
    """Stands for a signal: nothing in the library may catch it."""


@pytest.mark.parametrize("compress", [True, False], ids=["compressed", "dense"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_killed_run_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, compress: bool
) -> None:
    resumable(tmp_path / "whole", kind, compress=compress)
    real = run._prune_block

    def dies_in_block_two(runner: calibrate.BlockRunner, *rest: object) -> object:
        if runner.index == 2:
            raise _Killed
        return real(runner, *rest)

    monkeypatch.setattr(run, "_prune_block", dies_in_block_two)
    with pytest.raises(_Killed):
        resumable(tmp_path / "broken", kind, compress=compress)
    monkeypatch.setattr(run, "_prune_block", real)
    report = resumable(tmp_path / "broken", kind, compress=compress)
    assert report.resumed == 2
    assert len(report.linears) == (12 if kind == "gpt2" else 21)
    for name in ("final", "block-00002.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    errors = [row.error for row in report.blocks]
    assert errors == [
        row.error for row in resumable(tmp_path / "whole", kind, compress=compress).blocks
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_killed_at_any_write_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    resumable(tmp_path / "whole", pruner="wanda", blocks=2)
    real = os.replace
    writes = 0

    def dies(fatal: int) -> object:
        nonlocal writes
        writes = 0

        def replace(source: str, target: Path) -> None:
            nonlocal writes
            writes += 1
            if when == "before" and writes == fatal:
                raise _Killed
            real(source, target)
            if when == "after" and writes == fatal:
                raise _Killed

        return replace

    # The writes of a run: its settings, then for each of two blocks the block, its rows, two tables.
    for fatal in range(1, 10):
        folder = tmp_path / str(fatal)
        monkeypatch.setattr(os, "replace", dies(fatal))
        with pytest.raises(_Killed):
            resumable(folder, pruner="wanda", blocks=2)
        monkeypatch.setattr(os, "replace", real)
        report = resumable(folder, pruner="wanda", blocks=2)
        # A block counts as finished once its rows are there: the third and the seventh write.
        assert report.resumed == sum(
            (fatal > n) or (fatal == n and when == "after") for n in (3, 7)
        )
        assert (folder / "final").read_bytes() == (tmp_path / "whole" / "final").read_bytes()
        with (folder / "linears.csv").open() as file:
            assert [row["name"] for row in csv.DictReader(file)] == [x.name for x in report.linears]


STOPS = """
import os, sys, tempfile
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import resumable

real, left = tempfile.mkstemp, int(sys.argv[3])

def stops(*arguments):
    global left
    made = real(*arguments)
    left -= 1
    if left == 0:
        print("writing", flush=True)
        sys.stdin.read()  # until it is killed
    return made

tempfile.mkstemp = stops
resumable.resumable(Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL is a thing of POSIX")
@pytest.mark.parametrize("write", [3, 6])
def test_a_process_killed_while_it_writes_resumes_to_the_same_bytes(
    tmp_path: Path, write: int
) -> None:
    folder = tmp_path / "killed"
    here = str(Path(__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, str(folder), here, str(write)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list(folder.glob(f".*{TEMPORARY}"))  # what it was writing
    resumable(folder)
    resumable(tmp_path / "whole")
    assert (folder / "final").read_bytes() == (tmp_path / "whole" / "final").read_bytes()
    assert not list(folder.glob(f".*{TEMPORARY}"))


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    llm.prune_model(tiny("llama"), batches(), "2:4", "wanda", work_dir=tmp_path, progress=False)
    with pytest.raises(s3.CheckpointError, match="pattern"):
        llm.prune_model(tiny("llama"), batches(), "4:8", "wanda", work_dir=tmp_path, progress=False)


def test_a_folder_of_a_run_over_other_linears_is_refused(tmp_path: Path) -> None:
    def run(word: str) -> None:
        llm.prune_model(
            tiny("llama"),
            batches(1),
            "2:4",
            "wanda",
            filter_fn=lambda _, name: word in name,
            work_dir=tmp_path,
            progress=False,
        )

    run("mlp")
    with pytest.raises(s3.CheckpointError, match="linears"):
        run("self_attn")


def test_a_folder_of_a_run_with_other_held_out_tokens_is_refused(tmp_path: Path) -> None:
    """Its finished blocks have errors on those tokens, or none."""

    def run(held_out: list[torch.Tensor] | None) -> None:
        llm.prune_model(
            tiny("llama"),
            batches(1),
            "2:4",
            "wanda",
            held_out=held_out,
            work_dir=tmp_path,
            progress=False,
        )

    run(None)
    with pytest.raises(s3.CheckpointError, match="held_out"):
        run(batches(1))


def test_a_folder_that_vanished_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run._prune_block

    def vanishing(runner: calibrate.BlockRunner, *rest: object) -> object:
        if runner.index == 1:
            shutil.rmtree(tmp_path / "run")
        return real(runner, *rest)

    monkeypatch.setattr(run, "_prune_block", vanishing)
    with pytest.raises(s3.CheckpointError, match=r"vanished during the run"):
        resumable(tmp_path / "run", pruner="wanda")
    assert not (tmp_path / "run").exists()


HOLDS = """
import sys
from s3tensor import llm
with llm.locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_two_runs_into_one_folder_are_refused(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(s3.CheckpointError, match="another run is at work"):
            resumable(tmp_path, pruner="wanda")
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    finally:
        other.communicate("\n")
    assert not list(tmp_path.iterdir())
    llm.check_out(tmp_path)
    resumable(tmp_path, pruner="wanda")


def test_a_lock_may_be_nested_in_one_process_and_goes_with_the_outer_one(tmp_path: Path) -> None:
    with llm.locked(tmp_path):
        with llm.locked(tmp_path):
            pass
        assert (tmp_path / "run.lock").exists()
    assert not (tmp_path / "run.lock").exists()


def test_what_a_broken_off_write_left_is_no_other_content_and_goes(tmp_path: Path) -> None:
    (tmp_path / f".run.json.abc{TEMPORARY}").write_text("half")
    llm.check_out(tmp_path)
    resumable(tmp_path, pruner="wanda")
    (tmp_path / f".block-00001.json.abc{TEMPORARY}").write_text("half")
    resumable(tmp_path, pruner="wanda")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    llm.forget_run(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["blocks.csv", "final", "linears.csv"]
    with pytest.raises(s3.CheckpointError, match="nothing was overwritten"):
        llm.check_out(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"pattern": 3}'])
def test_a_damaged_settings_file_is_refused(tmp_path: Path, text: str) -> None:
    resumable(tmp_path, pruner="wanda")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(s3.CheckpointError, match=r"damaged|holds an unfinished run"):
        resumable(tmp_path, pruner="wanda")


def test_a_block_of_another_model_is_refused(tmp_path: Path) -> None:
    resumable(tmp_path, pruner="wanda")
    save_state(tmp_path / "block-00001.safetensors", {"weight": torch.ones(2)})
    with pytest.raises(s3.CheckpointError, match="does not fit the model"):
        resumable(tmp_path, pruner="wanda")


def test_a_damaged_block_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    llm.prune_model(tiny("llama"), batches(), "2:4", "wanda", work_dir=tmp_path, progress=False)
    path = tmp_path / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(s3.CheckpointError, match="checksum"):
        llm.prune_model(tiny("llama"), batches(), "2:4", "wanda", work_dir=tmp_path, progress=False)


@pytest.mark.parametrize("int8", [False, True])
def test_a_run_beside_compressed_weights_goes_on(
    int8: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path) -> tuple[nn.Module, llm.PruneReport]:
        model = tiny("llama", 3)
        s3.sparsify_(model, "pair4:8", lambda module, name: "self_attn" in name)
        if int8:
            s3.quantize_(model)
        options = {"work_dir": folder, "progress": False}
        mlp = lambda module, name: "mlp" in name  # noqa: E731
        return model, llm.prune_model(model, batches(2), "2:4", filter_fn=mlp, **options)

    expected, _ = run(tmp_path / "whole")
    save, saved = RunFolder.save, 0

    def killed(self: RunFolder, *args: object) -> None:
        nonlocal saved
        if saved:
            raise _Killed
        saved += 1
        save(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(RunFolder, "save", killed)
    with pytest.raises(_Killed):
        run(tmp_path / "broken")
    monkeypatch.undo()
    found, report = run(tmp_path / "broken")
    assert report.resumed == 1
    pairs = zip(found.named_parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(one, other) and type(one) is type(other) for (_, one), other in pairs)
