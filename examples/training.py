"""Training under a pattern, measured: dense, one-shot pruned, and every mode of S3Sparse, on a CPU.

    python examples/training.py                      # both tasks, 2:4 and rowpair16, three seeds
    python examples/training.py --task digits --pattern 1:4 --seeds 5

Two tasks: scikit-learn's handwritten digits (where it is not installed, points labelled by a random network),
and the next character of the standard library's documentation. Every row takes the same number of steps.
``fixed`` trains dense for half of them, is pruned, and continues under its mask; ``ste``, ``srste`` and
``soft`` train under the pattern from the first step. Scores are those of the finalized model, whose weights
are compressed. The output layer stays dense. Every row restarts the optimizer at half time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import s3tensor as s3
from s3tensor import llm

MODES = ("fixed", "ste", "srste", "soft")


@dataclass(frozen=True)
class Task:
    """Data, a network, and what is measured on held-out data."""

    name: str
    measure: str  # "accuracy, %" or "perplexity of a character"
    train: tuple[Tensor, Tensor]  # inputs, labels
    test: tuple[Tensor, Tensor]
    network: Callable[[], nn.Module]
    score: Callable[[Tensor, Tensor], float]  # (logits, labels)
    steps: int
    batch: int
    learning_rate: float


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100.0 * float((logits.argmax(-1) == labels).float().mean())


def perplexity(logits: Tensor, labels: Tensor) -> float:
    return float(F.cross_entropy(logits, labels).exp())


def digits() -> Task:
    """8x8 handwritten digits: 1,347 to train, 450 to test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        return teacher()
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return classification("digits", (x[:1347], y[:1347]), (x[1347:], y[1347:]))


def teacher() -> Task:
    """Points in 64 dims with the label that a random network gives them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(64, 32, generator=generator) / 8
    second = torch.randn(32, 10, generator=generator)
    x = torch.randn(6000, 64, generator=generator)
    y = ((x @ first).relu() @ second).argmax(-1)
    return classification("synthetic", (x[:4000], y[:4000]), (x[4000:], y[4000:]))


def classification(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], width: int = 32
) -> Task:
    def network() -> nn.Module:
        layers = {
            "first": nn.Linear(64, width),
            "relu": nn.ReLU(),
            "second": nn.Linear(width, width),
            "relu2": nn.ReLU(),
            "classifier": nn.Linear(width, 10),  # an output head: it stays dense
        }
        return nn.Sequential(OrderedDict(layers))

    return Task(name, "accuracy, %", train, test, network, accuracy, 600, 64, 3e-3)


class Characters(nn.Module):
    """The next character from the 16 before it (Y. Bengio et al., JMLR 2003)."""

    def __init__(self, alphabet: int, width: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 12)
        self.first = nn.Linear(16 * 12, width)
        self.second = nn.Linear(width, width)
        self.classifier = nn.Linear(width, alphabet)  # an output head: it stays dense

    def forward(self, x: Tensor) -> Tensor:  # (batch, 16) -> (batch, alphabet)
        hidden = F.gelu(self.first(self.embedding(x).flatten(1)))
        return self.classifier(F.gelu(hidden + self.second(hidden)))


def characters() -> Task:
    """Characters of pydoc's topics: 258 thousand to train; the first 10,000 of other topics to test."""
    texts = [llm.load_text("pydoc", part) for part in ("calibration", "held-out")]
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    sets = []
    for text in texts:
        windows = torch.tensor([alphabet[c] for c in text]).unfold(0, 17, 1)
        sets.append((windows[:, :-1], windows[:, -1]))
    train, (x, y) = sets
    test = x[:10_000], y[:10_000]
    build = lambda: Characters(len(alphabet))  # noqa: E731
    measure = "perplexity of a character"
    return Task("characters", measure, train, test, build, perplexity, 400, 256, 3e-3)


def train(task: Task, model: nn.Module, first: int, last: int, seed: int) -> None:
    """Steps ``first`` to ``last`` of the task's run; in its second half the learning rate falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, weight_decay=0.01)
    generator = torch.Generator().manual_seed(1000 * seed + first)
    inputs, labels = task.train
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * min(1.0, 2 * (1 - step / task.steps))
        rows = torch.randint(len(inputs), (task.batch,), generator=generator)
        F.cross_entropy(model(inputs[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(task: Task, model: nn.Module) -> float:
    inputs, labels = task.test
    with torch.no_grad():
        return task.score(model.eval()(inputs), labels)


def one_seed(task: Task, patterns: list[str], seed: int) -> dict[str, dict[str, float]]:
    """What each method reaches under each pattern, and the dense network."""
    torch.manual_seed(seed)
    fresh = task.network()
    half = task.steps // 2
    halfway = copy.deepcopy(fresh)
    train(task, halfway, 0, half, seed)
    dense = copy.deepcopy(halfway)
    train(task, dense, half, task.steps, seed)
    found = {"dense": dict.fromkeys(patterns, measured(task, dense))}
    for pattern in patterns:
        pruned = copy.deepcopy(dense)
        s3.sparsify_(pruned, pattern)
        found.setdefault("one-shot", {})[pattern] = measured(task, pruned)
        for mode in MODES:
            model = copy.deepcopy(halfway if mode == "fixed" else fresh)
            s3.sparsify_training_(model, pattern, mode)
            if mode != "fixed":
                train(task, model, 0, half, seed)
            train(task, model, half, task.steps, seed)
            s3.finalize(model)
            found.setdefault(mode, {})[pattern] = measured(task, model)
    return found


def table(task: Task, patterns: list[str], runs: list[dict[str, dict[str, float]]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    lines = [
        f"| {task.name}: {task.measure} | " + " | ".join(patterns) + " |",
        "|---" * (len(patterns) + 1) + "|",
    ]
    for method in runs[0]:
        cells = []
        for pattern in patterns:
            values = [run[method][pattern] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--task", choices=("digits", "characters", "both"), default="both")
    parser.add_argument("--pattern", action="append", help="repeat for several")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every row; default 600 and 400")
    args = parser.parse_args()
    patterns = args.pattern or ["2:4", "rowpair16"]
    if args.seeds < 1 or (args.steps is not None and args.steps < 2):
        sys.exit("error: --seeds must be at least 1 and --steps at least 2")
    torch.set_num_threads(1)  # small products gain nothing from more
    for build in (digits, characters):
        if args.task not in (build.__name__, "both"):
            continue
        start = time.process_time()
        task = build()
        if args.steps:
            task = replace(task, steps=args.steps)
        runs = [one_seed(task, patterns, seed) for seed in range(args.seeds)]
        seconds = time.process_time() - start
        print(table(task, patterns, runs))
        print(
            f"\n{args.seeds} seeds, {task.steps} steps of {task.batch}, {seconds:.0f} s of one core\n"
        )


if __name__ == "__main__":
    main()
