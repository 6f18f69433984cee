"""Tasks of lm_eval, run through its own Hugging Face model class."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import logging
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from s3tensor.errors import CalibrationError, OptionError
from s3tensor.modes import neutral

if TYPE_CHECKING:
    import pandas as pd

TASKS = Path(__file__).parent / "tasks"  # our own, for lm_eval's --include_path
_OFFLINE = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group."""

    task: str
    metric: str  # followed by a comma and its filter unless that is "none"
    value: float
    stderr: float | None  # None if lm_eval gives none


@dataclass(frozen=True)
class TaskReport:
    """The scores of :func:`evaluate_tasks`, one per metric, and the settings behind them."""

    scores: list[TaskScore]
    settings: dict[str, Any] = field(default_factory=dict)

    def frame(self, against: TaskReport | None = None) -> pd.DataFrame:
        """Rows of ``task, metric, value, stderr``; against another report also ``dense`` and ``change``."""
        import pandas as pd

        frame = pd.DataFrame([asdict(score) for score in self.scores])
        frame["stderr"] = frame["stderr"].astype(float)
        if against is not None:
            other = {(score.task, score.metric): score.value for score in against.scores}
            frame["dense"] = [other.get((score.task, score.metric)) for score in self.scores]
            frame["change"] = frame["value"] - frame["dense"]
        return frame

    def to_dict(self) -> dict[str, Any]:
        """For JSON: ``scores``, one row per metric, and ``settings``."""
        return {"scores": [asdict(score) for score in self.scores], "settings": self.settings}


@neutral()
def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 1,
    seq_len: int | None = None,
    include_path: str | Path | None = None,
) -> TaskReport:
    """Evaluate a model, pruned or not, on tasks of lm_eval.

    Args:
        model: a causal language model of transformers, on the device to use.
        tokenizer: of the model.
        tasks: names of tasks, groups or tags, globs of them, or paths of YAML files, as a sequence or
            separated by commas. Ours need no network: ``s3_pydoc`` (perplexity per word and byte) and
            ``s3_pydoc_choice`` (accuracy).
        num_fewshot: few-shot examples; default the task's own.
        limit: evaluate only this many documents of each task, or this share if below 1.
        batch_size: documents in one pass, or ``auto``.
        seq_len: tokens in a window; default the model's maximum.
        include_path: a folder of YAML files with more tasks.

    Raises:
        ImportError: lm_eval is not installed; names the extra that installs it.
        OptionError: no task, or a limit, count, window or batch size out of range.
        CalibrationError: an unknown task, a window longer than the model's maximum, or data that is
            neither in the cache nor on the network.
    """
    wanted = check_tasks(
        tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        seq_len=seq_len,
        include_path=include_path,
    )
    lm_eval = _imported()
    from lm_eval.models.huggingface import HFLM

    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if seq_len is not None and isinstance(positions, int) and seq_len > positions:
        raise CalibrationError(
            f"windows of {seq_len} tokens for a model of {positions} positions; give a seq_len of at "
            f"most {positions}"
        )
    manager = _manager(include_path, wanted)
    was_training = model.training
    model.eval()
    try:
        with _quiet():
            loaded = _load(manager, wanted)
            wrapped = HFLM(
                pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=seq_len
            )
            given = lm_eval.simple_evaluate(
                wrapped,
                tasks=loaded,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                limit=limit,
                log_samples=False,
                task_manager=manager,
            )
    finally:
        model.train(was_training)
    settings = {
        "tasks": wanted,
        "num_fewshot": dict(given.get("n-shot", {})),
        "samples": {name: n["effective"] for name, n in given.get("n-samples", {}).items()},
        "limit": limit,
        "batch_size": batch_size,
        "seq_len": wrapped.max_length,
        "versions": {
            "tasks": dict(given.get("versions", {})),
            "lm_eval": lm_eval.__version__,
            "python": platform.python_version(),  # whose documentation our tasks read
        },
    }
    return TaskReport(list(scores({**given["results"], **given.get("groups", {})})), settings)


def check_tasks(
    tasks: str | Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | str = 1,
    seq_len: int | None = None,
    include_path: str | Path | None = None,
) -> list[str]:
    """The names of the tasks, expanded, without loading a model or data.

    Arguments and errors as for :func:`evaluate_tasks`.
    """
    entries = [tasks] if isinstance(tasks, str) else tasks
    names = [name.strip() for entry in entries for name in entry.split(",") if name.strip()]
    _check_settings(names, limit, num_fewshot, batch_size, seq_len)
    _imported()
    known = _manager(include_path, names).all_tasks
    found = {
        name: [str(Path(name).absolute())] if _is_file(name) else fnmatch.filter(known, name)
        for name in names
    }
    _refuse_unknown(found, known)
    return list(dict.fromkeys(task for matches in found.values() for task in matches))


def run_command(arguments: Sequence[str]) -> int:
    """Run lm_eval's own command line in this process, where ``quant_method: "s3"`` is registered.

    ``run`` also finds our tasks, unless ``--include_path`` is given. Returns the exit status.

    Raises:
        ImportError: without lm_eval.
    """
    _imported()
    from lm_eval.__main__ import cli_evaluate

    given = list(arguments)
    runs = bool(given) and (given[0] == "run" or given[0].startswith("-"))
    if runs and not any(arg.partition("=")[0] == "--include_path" for arg in given):
        given += ["--include_path", str(TASKS)]
    before = sys.argv
    sys.argv = ["lm_eval", *given]
    try:
        cli_evaluate()
    except SystemExit as end:  # of argparse
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[TaskScore]:
    """The metrics of lm_eval's ``results``, ``{task: {"METRIC,FILTER": value}}``, in their order."""
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or isinstance(value, (str, bool)):
                continue
            if not isinstance(value, (int, float)) or not filtered:
                continue  # "alias", "sample_len" and the like are not metrics
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else name
            number = float(stderr) if isinstance(stderr, (int, float)) else None
            yield TaskScore(task, shown, float(value), number)


def _imported() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != "lm_eval":
            raise ImportError(f"lm_eval cannot be imported ({error})") from error
        raise ImportError(
            "tasks need the package lm_eval: pip install 's3tensor[eval]'", name="lm_eval"
        ) from None
    return lm_eval


def _check_settings(
    names: list[str],
    limit: float | None,
    num_fewshot: int | None,
    batch_size: int | str,
    seq_len: int | None,
) -> None:
    if not names:
        raise OptionError(f"no task given; these need no network: {', '.join(_OFFLINE)}")
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise OptionError(f"limit={limit} must be a count of documents, or a share below 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise OptionError(f"num_fewshot={num_fewshot} must be >= 0")
    if not (batch_size == "auto" or (isinstance(batch_size, int) and batch_size >= 1)):
        raise OptionError(f"batch_size={batch_size!r} must be >= 1, or auto")
    if seq_len is not None and seq_len < 2:
        raise OptionError(f"seq_len={seq_len} must be >= 2 tokens")


@functools.lru_cache(maxsize=1)
def _all_tasks() -> Any:
    """A TaskManager of lm_eval's own tasks and ours; indexing them takes half a minute on a cold disk."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS))


def _manager(include_path: str | Path | None, names: Sequence[str]) -> Any:
    """A TaskManager for the names; without lm_eval's own tasks if ours and the folder's suffice."""
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS)] if include_path is None else [str(TASKS), str(include_path)]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if all(_is_file(name) or fnmatch.filter(manager.all_tasks, name) for name in names):
        return manager
    return _all_tasks() if include_path is None else TaskManager(include_path=folders)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _refuse_unknown(found: Mapping[str, list[str]], known: Sequence[str]) -> None:
    unknown = [name for name, matches in found.items() if not matches]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=4, cutoff=0.5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise CalibrationError(
            f"no task {unknown[0]!r}{hint}; all are listed by: s3tensor lm-eval ls tasks"
        )


def _load(manager: Any, names: list[str]) -> list[Any]:
    """The tasks and groups, with their data."""
    loaded: list[Any] = []
    for name in names:
        try:
            built = manager.load([name])
        except Exception as error:  # data sets fail in many ways, all for want of data
            from datasets.config import HF_DATASETS_CACHE

            reason = " ".join(str(error).split()) or type(error).__name__
            raise CalibrationError(
                f"the data of task {name!r} cannot be had ({reason:.200}); it is neither in the cache "
                f"{HF_DATASETS_CACHE} nor on the network. Run this once on a machine with a network and copy "
                f"the cache, or use {', '.join(_OFFLINE)}, which need none"
            ) from error
        groups = built.get("groups") or {}
        top = groups.get(name)
        loaded.extend([top] if top is not None else built["tasks"].values())
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm_eval's advice on unused arguments, and its call of git (noisy outside a repository)."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    logger = logging.getLogger("lm_eval")
    level, git = logger.level, getattr(evaluator, "get_git_commit_hash", None)
    logger.setLevel(logging.ERROR)
    if git is not None:
        evaluator.get_git_commit_hash = lambda: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        logger.setLevel(level)
        if git is not None:
            evaluator.get_git_commit_hash = git  # type: ignore[attr-defined]
