"""Faults of a whole run of ``s3tensor prune``: one clear line, nothing lost, and the same command goes on.

What is tested elsewhere: single files in test_checkpoint, kills in the middle of a block and at each write in
test_llm_resume, Ctrl-C and kills while the model is saved in test_cli. ``bench/faults.py`` kills at random.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from s3tensor import cli, llm
from s3tensor.io import pretrained as hf
from s3tensor.llm import run as pruning

transformers = pytest.importorskip("transformers")
from saved_models import byte_level  # noqa: E402 - needs transformers

SHORT = ("--samples", "4", "--seq-len", "16", "--eval-samples", "0", "--pruner", "wanda")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(llm.load_text("pydoc")[:4000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with a random Llama of three blocks, 100 kB, and a tokenizer of bytes."""
    import torch

    fast = byte_level(256)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=len(fast), max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "dense"
    hf.save_pretrained(transformers.LlamaForCausalLM(config), folder, fast, dense=True)
    return folder


def command(model: Path, text: Path, out: Path) -> list[str]:
    return ["prune", str(model), "--calibration", str(text), "--out", str(out), *SHORT]


def run(model: Path, text: Path, out: Path) -> Result:
    return CliRunner().invoke(cli.main, command(model, text, out))


@pytest.fixture(scope="module")
def whole(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = run(model, text, out)
    assert done.exit_code == 0, done.output
    return (out / hf.WEIGHTS).read_bytes()


class _Killed(BaseException):
    """Stands for a signal: nothing in the library may catch it."""


def test_a_run_killed_at_any_deletion_after_it_has_saved_goes_on_to_the_same_bytes(
    model: Path, text: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.unlink
    for fatal in range(1, 8):  # rows and tensors of three blocks, and the settings
        out = tmp_path / str(fatal)
        left = fatal

        def dies(self: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if self.name.startswith(("block-", "run.json")):
                left -= 1
                if left == 0:
                    raise _Killed
            real(self, missing_ok=missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", dies)
            with pytest.raises(_Killed):
                run(model, text, out)
        again = run(model, text, out)
        assert again.exit_code == 0, again.output
        assert (out / hf.WEIGHTS).read_bytes() == whole
        assert not list(out.glob("block-*")) and not (out / "run.json").exists()


def test_what_other_libraries_left_half_written_goes_with_the_run(
    model: Path, text: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors and tokenizers write through a file of such a name."""

    def killed(folder: Path, *_: object, **__: object) -> None:
        (folder / ".tmpa1B2c3").write_text("half")
        (folder / ".template").write_text("the user's own")
        raise _Killed

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_pretrained", lambda _, folder, *rest, **options: killed(folder))
        with pytest.raises(_Killed):
            run(model, text, out)
    assert run(model, text, out).exit_code == 0
    assert (out / hf.WEIGHTS).read_bytes() == whole
    assert [path.name for path in out.glob(".*")] == [".template"]


FULL_DISK = """
import resource, signal, sys
from s3tensor.cli import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit fails, as on a full disk
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file size limits are a thing of POSIX")
def test_a_disk_that_is_full_while_the_model_is_saved_costs_no_block(
    model: Path, text: Path, whole: bytes, tmp_path: Path
) -> None:
    """Blocks are smaller than the limit, the whole model is larger."""
    out = tmp_path / "out"
    limit = str(3 * len(whole) // 4)
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, limit, *command(model, text, out)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert "cannot write" in last and "free space" in last, found.stderr
    assert "Traceback" not in found.stderr
    assert len(list(out.glob("block-*.json"))) == 3 and not (out / hf.WEIGHTS).exists()
    done = run(model, text, out)  # with room again
    assert done.exit_code == 0, done.output
    assert (out / hf.WEIGHTS).read_bytes() == whole


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the super-user may write anywhere"
)
def test_a_read_only_folder_is_refused_before_the_model_is_loaded(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "locked"
    out.mkdir()
    out.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        found = run(model, text, out)
    finally:
        out.chmod(stat.S_IRWXU)
    assert found.exit_code == 1 and "cannot write to" in found.stderr
    assert "choose another folder" in found.stderr and "Traceback" not in found.output


def test_a_folder_below_a_file_is_one_clear_line(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found = run(model, text, tmp_path / "file" / "out")
    assert found.exit_code == 1 and "cannot write to" in found.stderr
    assert "Traceback" not in found.output
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_folder_that_vanishes_during_the_run_is_one_clear_line(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = pruning._prune_block

    def vanishing(runner: object, *rest: object) -> object:
        if runner.index == 1:  # type: ignore[attr-defined]
            shutil.rmtree(out)
        return real(runner, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pruning, "_prune_block", vanishing)
    found = run(model, text, out)
    assert found.exit_code == 1 and "vanished during the run" in found.stderr
    assert "start again in another folder" in found.stderr and "Traceback" not in found.output


SLOWLY = """
import signal, sys, time
from s3tensor.cli import main
from s3tensor.llm import run as pruning

# A shell makes what it starts in the background deaf to it, and what that starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
real = pruning._prune_block

def waits(runner, *rest):
    if runner.index == 1:
        print("in the second block", flush=True)
        time.sleep(60)
    return real(runner, *rest)

pruning._prune_block = waits
main()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="sends a signal of POSIX")
def test_control_c_of_a_real_process_leaves_130_one_line_and_the_finished_blocks(
    model: Path, text: Path, whole: bytes, tmp_path: Path
) -> None:
    """And meanwhile a second run into the folder is refused."""
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *command(model, text, out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(line == "in the second block\n" for line in process.stdout)
        second = run(model, text, out)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert second.exit_code == 1 and "another run is at work" in second.stderr
    assert process.returncode == 130
    assert "the same command resumes from there" in errors and "Traceback" not in errors
    assert [path.name for path in out.glob("block-*.json")] == ["block-00000.json"]
    done = run(model, text, out)
    assert done.exit_code == 0, done.output
    assert (out / hf.WEIGHTS).read_bytes() == whole
