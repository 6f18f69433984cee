"""The command line on a small saved model: the whole way, broken off and gone on with, and every refusal."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import s3tensor as s3
from s3tensor import cli, llm, prune
from s3tensor.io import pretrained as hf
from s3tensor.llm import run as pruning

transformers = pytest.importorskip("transformers")
from saved_models import byte_level  # noqa: E402 - needs transformers

BLOCKS = 3
SHORT = ("--samples", "4", "--seq-len", "32", "--eval-samples", "3", "--pruner", "wanda")


@pytest.fixture(scope="module", autouse=True)
def _few_topics() -> Iterator[None]:
    """A small part of the documentation topics: tokenizing all of them takes half a second each time."""
    from pydoc_data import topics

    few = dict(sorted(topics.topics.items(), key=lambda item: len(item[1]))[:60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topics, "topics", few)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama and a tokenizer that was trained on the calibration topics."""
    folder = tmp_path_factory.mktemp("models") / "model"
    fast = byte_level(320)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(fast),
        max_position_embeddings=64,
    )
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    s3.save_pretrained(network, folder, fast, dense=True)
    return folder


@pytest.fixture(scope="module")
def sparse(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model pruned by the command line."""
    folder = tmp_path_factory.mktemp("pruned") / "sparse"
    done = run("prune", model, "--out", folder, *SHORT)
    assert done.exit_code == 0, done.output
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def refused(result: Result, code: int, *words: str) -> str:
    """Check that a command ended in one line and an exit code; the line."""
    assert result.exit_code == code, result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, result.output
    assert lines[0].startswith("Error: ")
    for word in words:
        assert word in lines[0]
    return lines[0]


# the whole way --------------------------------------------------------------------------------------


def test_prune_verify_eval_and_show(model: Path, tmp_path: Path) -> None:
    folder, report = tmp_path / "sparse", tmp_path / "figures" / "report.json"
    done = run("prune", model, "--pattern", "2:4", "--out", folder, "--report", report, *SHORT)
    assert done.exit_code == 0, done.output
    assert f"{7 * BLOCKS} linears in {BLOCKS} blocks pruned to 2:4 by wanda" in done.output
    for row in ("perplexity", "weights in memory", "weights on disk"):
        assert row in done.output
    assert f"block {BLOCKS}/{BLOCKS}" in done.output

    figures = json.loads(report.read_text())
    assert figures["layers"] == 7 * BLOCKS
    assert figures["density"] == 0.5
    assert figures["seconds"] > 0
    assert figures["compressed_bytes"] < figures["dense_bytes"]
    assert figures["calibration"] == {
        "source": "pydoc",
        "samples": 4,
        "seq_len": 32,
        "seed": 0,
    }
    network, tokenizer = hf.load_model(folder)
    text = llm.tokenize(llm.load_text("pydoc", "held-out"), tokenizer)
    expected = s3.perplexity(network, llm.windows(text, 3, 32), 32)
    assert figures["pruned_perplexity"] == pytest.approx(expected, rel=1e-6)
    dense = s3.perplexity(hf.load_model(model)[0], llm.windows(text, 3, 32), 32)
    assert figures["dense_perplexity"] == pytest.approx(dense, rel=1e-6)

    present = {path.name for path in folder.iterdir()}
    expected_files = {
        "linears.csv",
        "blocks.csv",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert expected_files <= present
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "2:4" in card and "s3tensor" in card
    assert not [name for name in present if name.startswith((".", "block-", "run."))]
    with (folder / "linears.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 7 * BLOCKS
    with (folder / "blocks.csv").open() as file:
        assert [row["block"] for row in csv.DictReader(file)] == ["0", "1", "2"]

    checked = run("verify", folder)
    assert checked.exit_code == 0
    assert f"{7 * BLOCKS} sparse weights satisfy 2:4; mean density 0.5000" in checked.output
    measured = run("eval", folder, "--samples", 3, "--seq-len", 32)
    assert measured.exit_code == 0
    assert measured.output.strip() == f"perplexity {expected:.3f}"
    shown = run("show", "2:4", "--shape", "8x16")
    assert shown.exit_code == 0
    assert "2 of 4" in shown.output


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = run("show", "pair4:8", "--out", tmp_path / "picture.png")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_all_that_is_printed(sparse: Path) -> None:
    figures = json.loads(run("eval", sparse, "--samples", 2, "--seq-len", 32, "--json").stdout)
    assert figures["perplexity"] > 1
    assert figures["samples"] == 2
    rows = json.loads(run("verify", sparse, "--json").stdout)
    assert len(rows) == 7 * BLOCKS
    assert rows[0]["pattern"] == "2:4"
    facts = json.loads(run("show", "rowpair16", "--shape", "16x32", "--json").stdout)
    assert facts["scopes"] == 16 and facts["density"] == 0.5
    assert facts["value_bytes"] + facts["index_bytes"] == 512 + 2


def test_json_of_prune_and_convert_is_all_that_is_printed(model: Path, tmp_path: Path) -> None:
    folder, plain, report = tmp_path / "sparse", tmp_path / "plain", tmp_path / "report.json"
    done = run("prune", model, "--out", folder, "--report", report, "--json", *SHORT)
    figures = json.loads(done.stdout)
    assert figures.pop("saved") == str(folder / "model.safetensors")
    assert figures == json.loads(report.read_text())
    done = run("convert", folder, "--to", "dense", "--out", plain, "--json")
    assert json.loads(done.stdout)["newly_compressed"] == {}
    options = ("--to", "compressed", "--int8", "--out", tmp_path / "small", "--json")
    figures = json.loads(run("convert", plain, *options).stdout)
    assert figures["newly_compressed"] == {"2:4": 7 * BLOCKS} and figures["int8"]
    assert figures["bytes"] < figures["dense_bytes"]


def test_a_dense_export_is_for_transformers_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    done = run("prune", model, "--out", folder, "--format", "dense", *SHORT)
    assert done.exit_code == 0, done.output
    found = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert s3.satisfies(found.model.layers[1].mlp.up_proj.weight.detach(), "2:4")
    assert run("eval", folder, "--samples", 2, "--seq-len", 32).exit_code == 0
    refused(run("verify", folder), 1, "dense model, without patterns")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "| Pattern | 2:4 |" in card
    assert "compressed" not in card and "pip install" not in card


def test_text_of_ones_own_gives_disjoint_windows(model: Path, tmp_path: Path) -> None:
    _, tokenizer = hf.load_model(model)
    path = tmp_path / "text.txt"
    path.write_text(llm.load_text("pydoc")[:6000])
    batches, held_out = cli.prune._texts(tokenizer, str(path), None, 32, 0, None, 5)
    assert held_out is not None
    windows = [tuple(row.tolist()) for batch in (*batches, held_out) for row in batch]
    available = llm.tokenize(path.read_text(), tokenizer).numel() // 32
    assert len(windows) == available
    assert len(batches) == available - 5
    # Calibration is what it would be without an evaluation.
    alone, nothing = cli.prune._texts(tokenizer, str(path), len(batches), 32, 0, None, 0)
    assert nothing is None
    assert all(map(torch.equal, batches, alone))
    # A text for evaluation leaves all of the other one to calibration.
    batches, held_out = cli.prune._texts(tokenizer, str(path), None, 32, 0, "pydoc", 5)
    assert len(batches) == available
    assert held_out is not None
    assert held_out.shape == (5, 32)


def test_no_evaluation_no_perplexity(model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = run(
        *("prune", model, "--out", tmp_path / "sparse", "--report", report, "--blocks", 1),
        *("--samples", 2, "--seq-len", 16, "--pruner", "magnitude", "--eval-samples", 0),
    )
    assert done.exit_code == 0, done.output
    figures = json.loads(report.read_text())
    assert figures["dense_perplexity"] is None
    assert figures["layers"] == 7
    assert "perplexity" not in done.output
    assert "Evaluation" not in (tmp_path / "sparse" / "README.md").read_text(encoding="utf-8")


# broken off -----------------------------------------------------------------------------------------


class _Killed(BaseException):
    """Stands for a signal."""


def dying(error: type[BaseException]) -> Callable[..., Any]:
    real = pruning._prune_block

    def dies_in_the_last(runner: Any, *rest: Any) -> Any:
        if runner.index == BLOCKS - 1:
            raise error
        return real(runner, *rest)

    return dies_in_the_last


def test_control_c_is_told_and_the_same_command_goes_on_to_the_same_bytes(
    model: Path, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = tmp_path / "again", tmp_path / "report.json"
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_prune_block", dying(KeyboardInterrupt))
        stopped = run("prune", model, "--out", folder, *SHORT)
    assert stopped.exit_code == 130
    assert "the same command resumes from there" in stopped.output
    assert "Traceback" not in stopped.output
    assert (folder / "run.json").exists()
    with (folder / "blocks.csv").open() as file:
        assert len(list(csv.DictReader(file))) == BLOCKS - 1
    refused(run("prune", model, "--out", folder, *SHORT, "--pattern", "4:8"), 1, "pattern")
    done = run("prune", model, "--out", folder, *SHORT, "--report", report)
    assert done.exit_code == 0, done.output
    assert json.loads(report.read_text())["resumed_blocks"] == BLOCKS - 1
    assert (folder / hf.WEIGHTS).read_bytes() == (sparse / hf.WEIGHTS).read_bytes()


@pytest.mark.parametrize("form", ["compressed", "dense"])
@pytest.mark.parametrize("place", ["save_pretrained", "forget_run"])
def test_a_run_killed_while_it_saves_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, form: str
) -> None:
    folder = tmp_path / "again"

    def killed(*_: Any, **__: Any) -> None:
        if place == "save_pretrained":  # half of a model is there
            (folder / "config.json").write_text("{")
            (folder / hf.WEIGHTS).write_text("half")
        raise _Killed

    command = ("prune", model, "--out", folder, "--format", form, *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(hf if place == "save_pretrained" else llm, place, killed)
        with pytest.raises(_Killed):
            run(*command)
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert run("eval", folder, "--samples", 2, "--seq-len", 32).exit_code == 0
    assert not (folder / "run.json").exists()


def test_a_second_run_into_a_folder_that_is_in_use_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = (
        "import sys; from s3tensor import llm\n"
        "with llm.locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        refused(run("prune", model, "--out", tmp_path, *SHORT), 1, "another run is at work")
    finally:
        other.communicate("")


def test_a_run_that_waited_for_another_leaves_its_finished_model_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, command = tmp_path / "shared", ("prune", model, "--out", tmp_path / "shared", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_prune_block", dying(KeyboardInterrupt))
        assert run(*command).exit_code == 130  # begun: the second run may start, to go on
    real, finished = cli.prune.load, []

    def load_while_the_first_ends(*arguments: Any) -> Any:
        monkeypatch.setattr(cli.prune, "load", real)
        assert run(*command).exit_code == 0
        finished.append((folder / hf.WEIGHTS).read_bytes())
        return real(*arguments)

    monkeypatch.setattr(cli.prune, "load", load_while_the_first_ends)
    refused(run(*command, "--pattern", "4:8"), 1, "nothing was overwritten")
    assert finished == [(folder / hf.WEIGHTS).read_bytes()]
    assert not (folder / "run.lock").exists()


# refusals -------------------------------------------------------------------------------------------


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a model is loaded."""

    def load(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(hf, "load_model", load)


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--samples", "0"), ("--samples", "x>=1")),
        (("--samples", "many"), ("--samples", "'many'")),
        (("--seq-len", "1"), ("--seq-len", "x>=2")),
        (("--eval-samples", "-1"), ("--eval-samples",)),
        (("--blocks", "0"), ("--blocks",)),
        (("--alpha", "2"), ("alpha=2.0",)),
        (("--alpha", "nan"), ("alpha=nan",)),
        (("--alpha", "best"), ("'best' is neither a number nor auto",)),
        (("--damp", "auto", "--alpha", "0"), ("dense target",)),
        (("--damp", "-1"), ("damp=-1",)),
        (("--damp", "nan"), ("damp=nan",)),
        (("--pruner", "foo"), ("unknown pruner 'foo'", "admm")),
        (("--pruner", "wanda", "--alpha", "0.5"), ("dense target",)),
        (("--dtype", "int8"), ("--dtype", "float16")),
        (("--device", "toaster"), ("--device", "'toaster'")),
        (("--device", "meta"), ("--device", "'meta'", "holds no values")),
        (("--device", "cuda:99"), ("--device", "'cuda:99'")),
        (("--misfit", "ignore"), ("--misfit",)),
        (("--format", "gguf"), ("--format",)),
        (("--seed", "-1"), ("--seed",)),
        (("--no-such-option",), ("--no-such-option",)),
        (("and", "another"), ("another",)),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_what_is_cheap_to_refuse_is_refused_before_loading(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    folder = tmp_path / "sparse"
    refused(run("prune", "model", "--out", folder, *arguments), 2, *words)
    assert not folder.exists()


@pytest.mark.usefixtures("never_loads")
def test_an_unknown_pattern_shows_the_grammar(tmp_path: Path) -> None:
    for command in (("prune", "model", "--out", tmp_path / "x", "--pattern"), ("show",)):
        done = run(*command, "2:4:8")
        assert done.exit_code == 2
        lines = done.output.splitlines()
        assert "unknown pattern '2:4:8'" in lines[0]
        assert any(line.strip().startswith("coupled2:4") for line in lines)
        assert "Traceback" not in done.output


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("content", ["s3tensor.safetensors", "notes.txt", "config.json"])
def test_a_folder_with_content_is_refused_and_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / content).write_text("precious")
    refused(run("prune", "model", "--out", tmp_path), 1, "nothing was overwritten")
    assert [path.name for path in tmp_path.iterdir()] == [content]
    assert (tmp_path / content).read_text() == "precious"
    refused(run("prune", "model", "--out", tmp_path / content), 1, "is a file")


@pytest.mark.usefixtures("never_loads")
def test_a_report_that_could_not_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "report.json"
    refused(run("prune", "model", "--out", tmp_path / "x", "--report", place), 1, "cannot write")


def test_figures_go_through_links_and_into_devices_which_stay(model: Path, tmp_path: Path) -> None:
    nothing, link, file = tmp_path / "null", tmp_path / "link", tmp_path / "file"
    nothing.symlink_to(os.devnull)
    link.symlink_to(file)
    for path in (nothing, link):
        done = run("eval", model, "--samples", 2, "--seq-len", 32, "--out", path)
        assert done.exit_code == 0, done.output
        done = run(
            *(
                "prune",
                model,
                "--out",
                tmp_path / f"of-{path.name}",
                "--report",
                path,
                "--blocks",
                1,
            ),
            *("--samples", 2, "--seq-len", 16, "--pruner", "magnitude", "--eval-samples", 0),
        )
        assert done.exit_code == 0, done.output
        assert path.is_symlink()
    assert nothing.resolve() == Path(os.devnull) and nothing.is_char_device()
    assert json.loads(file.read_text())["layers"] == 7


def test_a_bench_that_could_not_be_written_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3tensor import benchmark

    small = ("bench", "--shape", "16x64", "--batch", "1", "--device", "cpu")
    (tmp_path / "file").write_text("x")

    def measures(*_: Any) -> Any:
        raise AssertionError("something was measured")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "run", measures)
        refused(run(*small, "--out", tmp_path / "file" / "x.json"), 1, "cannot write")
    # What cannot be foreseen comes after the table: a file that is a folder's name by then.
    real = benchmark.run

    def run_and_spoil(*arguments: Any) -> Any:
        (tmp_path / "x.json").mkdir()
        return real(*arguments)

    monkeypatch.setattr(benchmark, "run", run_and_spoil)
    done = run(*small, "--out", tmp_path / "x.json")
    assert done.exit_code == 1 and "cannot write" in done.stderr
    assert "16x64" in done.stdout


def test_commands_without_their_arguments_are_one_line() -> None:
    refused(run("prune", "model"), 2, "--out", "s3tensor prune --help")
    refused(run("eval"), 2, "MODEL")
    refused(run("sew"), 2, "sew")
    refused(run("show", "2:4", "--shape", "8by16"), 2, "ROWSxCOLUMNS")
    refused(run("show", "2:4", "--shape", "0x16"), 2, "ROWSxCOLUMNS")
    refused(run("show", "2:4", "--shape", "8x18"), 2, "dim 1 has 18 elements")


def test_missing_and_other_models_are_refused(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "sparse")
    refused(run("prune", tmp_path / "nothing", *out), 1, "no model at")
    refused(run("prune", tmp_path, *out), 1, "no config.json")
    refused(run("eval", tmp_path / "nothing"), 1, "no model at")
    refused(run("verify", tmp_path / "nothing"), 1, "does not exist")
    refused(run("verify", tmp_path), 1, "holds no model")
    (tmp_path / "config.json").write_text("{}")
    refused(run("eval", tmp_path), 1, "cannot load a model")
    assert not (tmp_path / "sparse").exists()


def test_unusable_text_is_refused(model: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "sparse")
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    command = ("prune", model, *out, *SHORT, "--calibration")
    refused(run(*command, text), 1, "7 x 32 = 224", "more text")
    refused(run(*command, tmp_path / "nothing.txt"), 1, "no text at")
    refused(run(*command, tmp_path / "bytes.txt"), 1, "UTF-8")
    refused(run(*command, "pydoc", "--eval-text", text), 1, "more text")
    refused(run("eval", model, "--text", text), 1, "more text")
    refused(run("prune", model, *out, "--seq-len", 65, "--samples", 2), 1, "64 positions")
    refused(run("eval", model, "--seq-len", 65, "--samples", 2), 1, "64 positions")
    assert not list(tmp_path.glob("sparse/*"))


def test_a_pattern_that_fits_no_linear_is_refused(model: Path, tmp_path: Path) -> None:
    command = ("prune", model, "--out", tmp_path / "x", *SHORT, "--pattern", "5:48")
    refused(run(*command), 1, "no linear of the model can be pruned", "multiple of 48")
    refused(run(*command, "--misfit", "error"), 1, "q_proj", "multiple of 48")


def test_nan_in_a_model_is_refused_by_the_name_of_the_layer(model: Path, tmp_path: Path) -> None:
    network, tokenizer = hf.load_model(model)
    with torch.no_grad():
        network.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    s3.save_pretrained(network, tmp_path / "nan", tokenizer, dense=True)
    command = ("prune", tmp_path / "nan", "--out", tmp_path / "x", *SHORT)
    refused(run(*command, "--eval-samples", 0), 1, "layers.1.mlp.up_proj", "NaN")
    refused(run("eval", tmp_path / "nan", "--samples", 2, "--seq-len", 32), 1, "NaN")


def test_a_damaged_model_is_refused(sparse: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sparse, tmp_path / "copy"))
    data = bytearray((folder / hf.WEIGHTS).read_bytes())
    data[-100] ^= 1
    (folder / hf.WEIGHTS).write_bytes(data)
    refused(run("verify", folder), 1, "checksum")
    refused(run("eval", folder), 1, "checksum")
    (folder / hf.WEIGHTS).write_bytes(data[:-1])
    refused(run("verify", folder), 1, "truncated or altered")


def test_a_pruned_model_is_not_pruned_again(sparse: Path, tmp_path: Path) -> None:
    refused(run("prune", sparse, "--out", tmp_path / "x", *SHORT), 1, "compressed already")


def test_errors_of_the_system_and_of_missing_packages_are_one_line(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    for error, words in (
        (PermissionError(13, "Permission denied", "x"), ("Permission denied",)),
        (ImportError("No module named 'transformers'"), ("transformers", "pip install")),
        (OutOfMemoryError("CUDA out of memory.\nmore"), ("out of memory",)),
    ):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(hf, "verify", fails)
        refused(run("verify", sparse), 1, *words)


def test_an_error_of_our_own_is_not_hidden(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(hf, "verify", fails)
    assert isinstance(run("verify", sparse).exception, RuntimeError)


# help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["prune", "eval", "verify", "show"])
def test_help_teaches_with_examples(command: str) -> None:
    for flag in ("-h", "--help"):
        shown = run(command, flag)
        assert shown.exit_code == 0
        assert f"s3tensor {command} " in shown.output.split("Example")[1]


def test_help_names_every_pruner_and_every_pattern() -> None:
    text = run("prune", "--help").output
    assert all(name in text for name in prune.PRUNERS)
    text = run("show", "--help").output
    assert "rowpair16" in text
    assert "block:RxC@D" in text


@pytest.mark.parametrize("module", ["s3tensor", "s3tensor.cli"])
def test_a_process_gives_the_exit_code_and_one_line_on_stderr(tmp_path: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "verify", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ")
    assert done.stderr.count("\n") == 1
