"""lm_eval tasks: figures against their definition, the offline tasks, the commands, what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from saved_models import saved

import s3tensor as s3
from s3tensor import cli, llm
from s3tensor.errors import CalibrationError
from s3tensor.evaluate import harness
from s3tensor.io import pretrained as hf
from s3tensor.text.text import pydoc_topics

needs_lm_eval = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("lm_eval") is None,
    reason="needs the package lm_eval, of the extra eval",
)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "dense", positions=128)


@pytest.fixture(scope="module")
def sparse(dense: Path) -> Path:
    model, tokenizer = hf.load_model(dense)
    ids = torch.randint(len(tokenizer), (2, 32), generator=torch.Generator().manual_seed(1))
    llm.prune_model(model, [ids], "2:4", "magnitude", progress=False)
    folder = dense.parent / "sparse"
    s3.save_pretrained(model, folder, tokenizer)
    return folder


# the tasks ----------------------------------------------------------------------------------------


@needs_lm_eval
def test_passages_are_the_held_out_topics_whole_and_in_bounds() -> None:
    from s3tensor.evaluate.tasks import documentation

    pages = documentation.passages(version=1.0)["test"]["page"]
    assert list(pages) == list(documentation.passages()["test"]["page"])
    given = {p for topic in pydoc_topics("held-out").values() for p in topic.strip().split("\n\n")}
    assert {paragraph for page in pages for paragraph in page.split("\n\n")} == given
    for page in pages:
        assert len(page) <= documentation.PASSAGE or "\n\n" not in page


@needs_lm_eval
def test_questions_have_one_right_answer_that_the_topic_goes_on_with() -> None:
    from s3tensor.evaluate.tasks import documentation

    rows = list(documentation.questions()["test"])
    assert rows == list(documentation.questions()["test"]) and len(rows) > 50
    calibration = " ".join(llm.load_text("pydoc").split())
    joined = [" ".join(text.split()) for text in pydoc_topics("held-out").values()]
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"]) == documentation.CHOICES
        right = row["choices"][row["answer"]]
        # Some topics hold others.
        homes = [text for text in joined if f"{row['passage']} {right}" in text]
        assert any(all(choice in text for choice in row["choices"]) for text in homes)
        assert right not in calibration and row["passage"] not in calibration
    places = torch.tensor([row["answer"] for row in rows]).bincount()
    assert places.min() > len(rows) / 8  # no place is the right one too seldom


@needs_lm_eval
def test_bits_per_byte_are_those_of_the_model(dense: Path) -> None:
    """Against the log-likelihood summed by hand, each window after the end token or the one before."""
    from s3tensor.evaluate.tasks import documentation

    model, tokenizer = hf.load_model(dense, torch.float32)
    model.requires_grad_(False)
    report = harness.evaluate_tasks(model, tokenizer, ["s3_pydoc"], limit=2)
    found = {score.metric: score.value for score in report.scores}
    pages = documentation.passages()["test"]["page"][:2]
    total, length = 0.0, model.config.max_position_embeddings
    for page in pages:
        ids = tokenizer(page)["input_ids"]
        # Windows of lm_eval: the first begins with the end token; a later one sees as many tokens as fit.
        for start in range(0, len(ids), length):
            targets = ids[start : start + length]
            end = start + len(targets)
            before = [tokenizer.eos_token_id, *ids][max(0, end - length) : end]
            logits = model(input_ids=torch.tensor([before])).logits[0, -len(targets) :]
            total += float(
                logits.double().log_softmax(-1).gather(1, torch.tensor(targets)[:, None]).sum()
            )
    count = sum(len(page.encode()) for page in pages)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert found["bits_per_byte"] == pytest.approx(-total / count / math.log(2), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert math.log(found["word_perplexity"]) == pytest.approx(-total / words, rel=1e-4)
    assert report.settings["samples"] == {"s3_pydoc": 2}


@needs_lm_eval
def test_accuracy_is_the_share_of_right_choices(dense: Path) -> None:
    from s3tensor.evaluate.tasks import documentation

    model, tokenizer = hf.load_model(dense, torch.float32)
    model.train()
    report = harness.evaluate_tasks(
        model, tokenizer, ["s3_*_choice"], limit=12, batch_size=4, seq_len=120
    )
    assert model.training  # given back as it was
    model.eval().requires_grad_(False)
    rows = documentation.questions()["test"].select(range(12))
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['passage']} {choice}")["input_ids"]
            tail = len(whole) - len(tokenizer(row["passage"])["input_ids"])
            kept = whole[-121:]
            logits = model(input_ids=torch.tensor([kept[:-1]])).logits[0, -tail:]
            target = torch.tensor(kept[-tail:])[:, None]
            scores.append(float(logits.log_softmax(-1).gather(1, target).sum()))
        right += scores.index(max(scores)) == row["answer"]
    found = {score.metric: score for score in report.scores}
    assert found["acc"].value == pytest.approx(right / 12)
    stderr = math.sqrt(right / 12 * (1 - right / 12) / 11)
    assert found["acc"].stderr == pytest.approx(stderr)
    assert report.settings["seq_len"] == 120


# the commands -------------------------------------------------------------------------------------


@needs_lm_eval
def test_eval_shows_a_table_against_the_dense_model_and_writes_the_figures(
    dense: Path, sparse: Path, tmp_path: Path
) -> None:
    tasks = ("--tasks", "s3_pydoc, s3_pydoc_choice", "--limit", 3, "--device", "cpu")
    file = tmp_path / "figures.json"
    found = run("eval", sparse, *tasks, "--against", dense, "--out", file)
    assert found.exit_code == 0, found.output
    head, *lines = found.stdout.strip().splitlines()
    assert head.split() == ["task", "metric", "value", "stderr", "dense", "change"]
    assert len(lines) == 5 and "nan" not in found.stdout.lower()
    figures = json.loads(file.read_text())
    assert figures["model"] == str(sparse) and figures["against"]["model"] == str(dense)
    assert "perplexity" not in figures  # not asked for
    mine, other = (
        {(row["task"], row["metric"]): row for row in part["tasks"]["scores"]}
        for part in (figures, figures["against"])
    )
    for line in lines:
        task, metric, *numbers = line.split()
        value, reference = mine[task, metric]["value"], other[task, metric]["value"]
        shown = [float(number) for number in numbers]
        assert shown[0] == pytest.approx(value, abs=1e-4)
        assert shown[-2:] == [
            pytest.approx(reference, abs=1e-4), pytest.approx(value - reference, abs=1e-4)
        ]  # fmt: skip
    assert mine["s3_pydoc", "bits_per_byte"]["value"] != other["s3_pydoc", "bits_per_byte"]["value"]


@needs_lm_eval
def test_lm_eval_itself_loads_the_compressed_folder_and_finds_the_same(
    sparse: Path, tmp_path: Path
) -> None:
    """In a new process, as a user types it: nothing here has imported transformers or s3tensor."""
    import subprocess

    # Without the index of lm_eval's own tasks, which takes a quarter of a minute.
    program = (
        "import functools, lm_eval.tasks as tasks\n"
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)\n"
        "from s3tensor.cli import main\n"
        "main()"
    )
    command = [
        sys.executable, "-c", program, "lm-eval", "run", "--model", "hf",
        "--model_args", f"pretrained={sparse}", "--tasks", "s3_pydoc_choice",
        "--limit", "4", "--device", "cpu", "--output_path", str(tmp_path / "found.json"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "s3_pydoc_choice" in done.stdout
    (file,) = tmp_path.glob("found*.json")
    theirs = json.loads(file.read_text())["results"]["s3_pydoc_choice"]
    mine = run(
        "eval", sparse, "--tasks", "s3_pydoc_choice", "--limit", 4, "--device", "cpu", "--json"
    )
    scores = json.loads(mine.stdout)["tasks"]["scores"]
    assert {row["metric"]: row["value"] for row in scores} == {
        "acc": theirs["acc,none"], "acc_norm": theirs["acc_norm,none"]
    }  # fmt: skip


@needs_lm_eval
def test_a_task_of_ones_own_by_its_file_and_by_its_folder(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"page": "one two three"}\n{"page": "four five"}\n')
    (tmp_path / "mine.yaml").write_text(
        f"""task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
    )
    model, tokenizer = hf.load_model(dense)
    by_file = harness.evaluate_tasks(model, tokenizer, [str(tmp_path / "mine.yaml")])
    by_folder = harness.evaluate_tasks(model, tokenizer, ["mine"], include_path=tmp_path)
    assert by_file.scores == by_folder.scores
    assert [(score.task, score.metric) for score in by_file.scores] == [("mine", "bits_per_byte")]
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(CalibrationError, match="data of task 'mine' cannot be had") as caught:
        harness.evaluate_tasks(model, tokenizer, ["mine"], include_path=tmp_path)
    said = str(caught.value)
    assert "cache" in said and "s3_pydoc" in said and "\n" not in said


def test_scores_are_the_metrics_and_nothing_else() -> None:
    results = {
        "a": {
            "alias": "a", "sample_len": 5, "acc,none": 0.5, "acc_stderr,none": 0.1,
            "word_perplexity,none": 9.0, "word_perplexity_stderr,none": "N/A",
            "exact_match,strict": 1, "exact_match_stderr,strict": 0.0, "bypass,none": "text",
        }
    }  # fmt: skip
    assert list(harness.scores(results)) == [
        harness.TaskScore("a", "acc", 0.5, 0.1),
        harness.TaskScore("a", "word_perplexity", 9.0, None),
        harness.TaskScore("a", "exact_match,strict", 1.0, 0.0),
    ]


# what is refused ----------------------------------------------------------------------------------


def refused(result: Result, code: int, *words: str) -> None:
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@needs_lm_eval
def test_an_unknown_task_names_those_near_it_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    # One folder of lm_eval's tasks and ours: all of them take a quarter of a minute to index.
    one = Path(lm_eval.tasks.__file__).parent / "hellaswag"
    known = lm_eval.tasks.TaskManager(include_path=[one, harness.TASKS], include_defaults=False)
    monkeypatch.setattr(harness, "_all_tasks", lambda: known)
    assert harness.check_tasks(["hellaswag,s3_pydoc"]) == ["hellaswag", "s3_pydoc"]
    assert harness.check_tasks("hellaswag, s3_pydoc") == ["hellaswag", "s3_pydoc"]
    with pytest.raises(CalibrationError, match=r"no task 's3_pydocs'; near it are s3_pydoc, "):
        harness.check_tasks(["s3_pydoc", "s3_pydocs"])
    nothing = tmp_path / "no-model"
    refused(run("eval", nothing, "--tasks", "helaswag"), 2, "no task 'helaswag'", "hellaswag")


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", ","), "no task given; these need no network: s3_pydoc, s3_pydoc_choice"),
        (("--tasks", "s3_pydoc", "--limit", "2.5"), "a count of documents, or a share"),
        (("--tasks", "s3_pydoc", "--batch-size", "many"), "'many' must be >= 1, or auto"),
        (("--tasks", "s3_pydoc", "--batch-size", "0"), "must be >= 1"),
        (("--limit", "2"), "--limit needs --tasks"),
        (("--num-fewshot", "2"), "--num-fewshot needs --tasks"),
        (("--tasks", "s3_pydoc", "--text-column", "body"), "--text-column needs --text"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(arguments: tuple[str, ...], words: str) -> None:
    refused(run("eval", "no-model", *arguments), 2, words)


@needs_lm_eval
def test_windows_longer_than_the_model_are_refused(dense: Path) -> None:
    tasks = ("--tasks", "s3_pydoc", "--device", "cpu")
    refused(run("eval", dense, *tasks, "--seq-len", 129), 1, "129", "128 positions")


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for command in (("eval", "no-model", "--tasks", "s3_pydoc"), ("lm-eval", "ls", "tasks")):
        refused(run(*command), 1, "pip install 's3tensor[eval]'")


@needs_lm_eval
def test_a_wrong_command_of_lm_eval_ends_with_its_own_status(
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = list(sys.argv)
    assert harness.run_command(["run", "--no_such_option"]) == 2
    assert sys.argv == before
    assert "usage: lm" in capfd.readouterr().err


# where it is used ---------------------------------------------------------------------------------


@needs_lm_eval
def test_the_table_2_script_takes_wikitext_or_where_it_cannot_be_had_the_documentation(
    dense: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib

    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    script = importlib.import_module("prune_gpt")
    asked: list[list[str]] = []

    def offline(model: Any, tokenizer: Any, tasks: list[str], **options: Any) -> Any:
        asked.append(tasks)
        if tasks == ["wikitext"]:
            raise CalibrationError("no network")
        return harness.evaluate_tasks(model, tokenizer, tasks, limit=1, **options)

    monkeypatch.setattr(script, "evaluate_tasks", offline)
    found = script.harness(*hf.load_model(dense), [])
    assert asked == [["wikitext"], ["s3_pydoc"]]
    assert set(found) == {
        f"s3_pydoc/{name}" for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    }
    assert "s3_pydoc, because no network" in capsys.readouterr().out
    with pytest.raises(CalibrationError, match="no network"):  # what was named is not replaced
        script.harness(*hf.load_model(dense), ["wikitext"])
