"""Pictures and a Markdown report of what ``bench/prune_gpt.py`` measured.

    python bench/plot_results.py demo-out/paper/results --model SmolLM2-135M
    python bench/plot_results.py demo-out/paper/results --model Qwen3-1.7B --compare sparsegpt_24 admm_24

For each pattern among the results: perplexity by blocks pruned, error of the decoder blocks, errors of the
linears by two methods against each other, error by sublayer, time, and where the second method improves on
the first. By default the first is SparseGPT, if it was run, and the second the one of the lowest perplexity.
They go to RESULTS/MODEL/report/ as PNG files, beside ``report.md``, which shows them.

A method has the same colour, marker and line style in all pictures; the colours are those of Okabe and Ito,
which colour-blind readers can tell apart.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from prune_gpt import PRUNERS, short_name

SUBLAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_COLOURS = ("#0072b2", "#e69f00", "#999999", "#cc79a7", "#56b4e9", "#009e73", "#d55e00", "#000000")
_MARKERS = "osD^vPX*"
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
_NAMES = {
    "sparsegpt": "SparseGPT",
    "true_obs": "S-OBS",
    "obd": "OBD",
    "wanda": "Wanda",
    "magnitude": "magnitude",
    "admm": "ADMM",
    "admm_recovery": "ADMM + recovery",
}


@dataclass(frozen=True)
class Run:
    """The results of one method."""

    method: str  # as its folder is called
    pattern: str
    summary: dict[str, Any]  # run.json
    linears: pd.DataFrame
    blocks: pd.DataFrame
    perplexity: pd.DataFrame

    @property
    def pruner(self) -> str:
        """``admm`` of ``admm_24-tag``."""
        return self.method.partition("-")[0].rpartition("_")[0]

    @property
    def label(self) -> str:
        """As a reader knows it."""
        tag = self.method.partition("-")[2]
        return _NAMES.get(self.pruner, self.pruner) + (f" ({tag})" if tag else "")


@dataclass(frozen=True)
class Look:
    """How a method is drawn, everywhere."""

    color: str
    marker: str
    linestyle: Any


def read(results: Path, model: str) -> list[Run]:
    """The runs of one model, in the order of ``PRUNERS``."""
    folder = results / short_name(model)
    runs = []
    for path in sorted(folder.glob("*/run.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        tables = (
            pd.read_csv(path.parent / f"{n}.csv") for n in ("linears", "blocks", "perplexity")
        )
        runs.append(Run(path.parent.name, summary["pattern"], summary, *tables))
    if not runs:
        known = sorted({path.parent.parent.name for path in results.glob("*/*/run.json")})
        there = f"; there are {', '.join(known)}" if known else ""
        raise SystemExit(f"error: no results of {model} in {results}{there}")
    rank = {name: place for place, name in enumerate(PRUNERS)}
    return sorted(runs, key=lambda run: (rank.get(run.pruner, len(rank)), run.method))


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """A look for each label: a pruner's own, and what is left for those with tags."""
    labels = list(dict.fromkeys(run.label for run in runs))
    own = {label: place for place, name in enumerate(PRUNERS) if (label := _NAMES[name]) in labels}
    free = [place for place in range(len(labels) + len(own)) if place not in own.values()]
    places = own | dict(zip((label for label in labels if label not in own), free, strict=False))
    return {
        label: Look(
            _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], _LINES[i % len(_LINES)]
        )
        for label, i in places.items()
    }


def pair_of(runs: Sequence[Run], wanted: Sequence[str] | None) -> tuple[Run, Run] | None:
    """The two runs to compare: those wanted, else SparseGPT (or the first) and the best other one."""
    by_name = {run.method: run for run in runs}
    if wanted and all(name in by_name for name in wanted):
        first, second = (by_name[name] for name in wanted)
        return first, second
    if len(runs) < 2:
        return None
    first = next((run for run in runs if run.pruner == "sparsegpt"), runs[0])
    others = [run for run in runs if run is not first]
    return first, min(others, key=lambda run: run.summary["perplexity"])


def side_by_side(first: Run, second: Run) -> pd.DataFrame:
    """Errors of the linears that both have pruned: columns index, sublayer, name, first, second, gain.

    ``gain`` is the share by which the second error is lower.
    """
    keys = ["index", "sublayer", "name"]
    both = first.linears[[*keys, "error"]].merge(
        second.linears[[*keys, "error"]], on=keys, suffixes=("_first", "_second")
    )
    both = both.rename(columns={"error_first": "first", "error_second": "second"})
    both["gain"] = 1 - both["second"] / both["first"]
    return both


def sublayers_of(frame: pd.DataFrame) -> list[str]:
    """The sublayers in the order in which a block calls them, unknown ones last."""
    present = list(dict.fromkeys(frame["sublayer"]))
    return [s for s in SUBLAYERS if s in present] + [s for s in present if s not in SUBLAYERS]


# pictures -----------------------------------------------------------------------------------------


def draw_perplexity(axes: Axes, runs: Sequence[Run], look: dict[str, Look]) -> None:
    """Perplexity by blocks pruned."""
    for run in runs:
        style = look[run.label]
        x, y = run.perplexity["blocks_pruned"], run.perplexity["perplexity"]
        axes.plot(
            x,
            y,
            color=style.color,
            marker=style.marker,
            linestyle=style.linestyle,
            label=f"{run.label}, {y.iloc[-1]:.2f}",
        )
    dense = float(runs[0].perplexity["perplexity"].iloc[0])
    axes.axhline(dense, color="0.5", linewidth=1, linestyle=":", label=f"dense, {dense:.2f}")
    _log_if_wide(axes, [value for run in runs for value in run.perplexity["perplexity"]])
    axes.set_xlabel("decoder blocks pruned")
    axes.set_ylabel("perplexity")
    points = sorted({int(x) for run in runs for x in run.perplexity["blocks_pruned"]})
    if len(points) <= 16:
        axes.set_xticks(points)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axes, 2)


def draw_decoder_error(axes: Axes, runs: Sequence[Run], look: dict[str, Look]) -> None:
    """Error of the hidden states after each block."""
    for run in runs:
        style = look[run.label]
        axes.plot(
            run.blocks["index"],
            run.blocks["error"],
            color=style.color,
            marker=style.marker,
            linestyle=style.linestyle,
            markersize=4,
            label=run.label,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("decoder block")
    axes.set_ylabel("relative error of its output")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_above(axes, 4)


def draw_scatter(axes: Axes, first: Run, second: Run) -> None:
    """Error of every linear by two methods."""
    both = side_by_side(first, second)
    for place, sublayer in enumerate(sublayers_of(both)):
        some = both[both["sublayer"] == sublayer]
        axes.scatter(
            some["first"],
            some["second"],
            s=26,
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKERS[place % len(_MARKERS)],
            alpha=0.8,
            linewidths=0,
            label=sublayer,
        )
    low = 0.9 * both[["first", "second"]].to_numpy().min()
    high = 1.1 * both[["first", "second"]].to_numpy().max()
    axes.plot([low, high], [low, high], color="0.3", linewidth=1)
    middle = (low * high) ** 0.5
    axes.annotate(
        "equal",
        (middle, middle),
        (-4, 4),
        textcoords="offset points",
        rotation=45,
        ha="center",
        va="bottom",
        rotation_mode="anchor",
        color="0.3",
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_plain))
        axis.set_minor_formatter(FuncFormatter(_plain_minor(high / low)))
    axes.set_xlabel(f"error of {first.label}")
    axes.set_ylabel(f"error of {second.label}")
    better = int((both["second"] < both["first"]).sum())
    axes.set_title(f"{second.label} is lower on {better} of {len(both)} linears", fontsize="medium")
    axes.legend()


def draw_sublayers(axes: Axes, runs: Sequence[Run], look: dict[str, Look]) -> None:
    """Median error of each sublayer over the blocks, with the range of the middle half."""
    names = sublayers_of(runs[0].linears)
    step = 0.8 / len(runs)
    for place, run in enumerate(runs):
        style = look[run.label]
        groups = [run.linears.loc[run.linears["sublayer"] == name, "error"] for name in names]
        middle = np.array([group.median() for group in groups])
        quarter = np.array([[group.quantile(0.25), group.quantile(0.75)] for group in groups]).T
        x = np.arange(len(names)) - 0.4 + step * (place + 0.5)
        axes.bar(x, middle, 0.92 * step, color=style.color, label=run.label)
        axes.errorbar(x, middle, abs(quarter - middle), fmt="none", ecolor="0.2", elinewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("relative output error, median\n(lines: middle half of the blocks)")
    _legend_above(axes, 4)


def draw_time(axes: Axes, runs: Sequence[Run], look: dict[str, Look]) -> None:
    """Seconds in the pruner and elsewhere."""
    places = np.arange(len(runs))[::-1]
    solver = np.array([float(run.blocks["solver_seconds"].sum()) for run in runs])
    recovery = np.array([float(run.blocks["recovery_seconds"].sum()) for run in runs])
    rest = np.array([float(run.blocks["seconds"].sum()) for run in runs]) - solver - recovery
    colors = [look[run.label].color for run in runs]
    axes.barh(places, solver, 0.6, color=colors, edgecolor="0.2")
    axes.barh(places, recovery, 0.6, solver, color=colors, alpha=0.45, hatch="///", edgecolor="0.2")
    axes.barh(places, rest, 0.6, solver + recovery, color="0.88", edgecolor="0.2")
    for place, first, whole in zip(places, solver, solver + recovery + rest, strict=True):
        axes.annotate(
            f"{_seconds(first)} s in the pruner,\n{_seconds(whole)} s in all",
            (whole, place),
            (4, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(places, [run.label for run in runs])
    axes.set_xlim(0, 1.45 * (solver + recovery + rest).max())
    middle = "hatched: recovery; " if recovery.any() else ""
    axes.set_xlabel(f"seconds\n(colour: in the pruner; {middle}grey: passes, Hessians)")
    axes.grid(axis="y", visible=False)


def draw_gain(axes: Axes, first: Run, second: Run) -> None:
    """By how much the second method's error is lower, for each linear."""
    both = side_by_side(first, second)
    names = sublayers_of(both)
    table = both.pivot_table(index="sublayer", columns="index", values="gain").loc[names]
    # One outlier must not fade the others.
    most = max(float(np.nanpercentile(abs(table.to_numpy()), 98)), 1e-6)
    image = axes.imshow(
        100 * table.to_numpy(),
        cmap="PuOr",
        norm=TwoSlopeNorm(0, -100 * most, 100 * most),
        aspect="auto",
    )
    axes.set_yticks(range(len(names)), names)
    columns = list(table.columns)
    step = max(1, len(columns) // 10)
    axes.set_xticks(range(0, len(columns), step), columns[::step])
    axes.set_xlabel("decoder block")
    axes.grid(visible=False)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, extend="both")
    bar.set_label("error lower by, %")
    axes.set_title(
        f"{second.label} against {first.label}: median {100 * both['gain'].median():+.1f} % "
        "(violet: lower error)",
        fontsize="medium",
    )


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    if max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(FuncFormatter(_plain_minor(max(values) / min(values))))


def _legend_above(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False)


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _plain_minor(span: float) -> Callable[[float, object], str]:
    """Labels between the decades of a log axis: 2 and 5, and where it is short every one."""
    wanted = (2.0, 5.0) if span > 8 else (2.0, 3.0, 4.0, 5.0, 6.0, 8.0)

    def label(value: float, _: object) -> str:
        leading = value / 10.0 ** np.floor(np.log10(value))
        return f"{value:g}" if any(abs(leading - w) < 1e-6 for w in wanted) else ""

    return label


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


# report -------------------------------------------------------------------------------------------


def pictures(
    runs: Sequence[Run],
    pattern: str,
    look: dict[str, Look],
    wanted: Sequence[str] | None,
    folder: Path,
) -> list[tuple[Path, str]]:
    """Draw what the runs of one pattern give; returns ``(file, caption)``."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[str, tuple[float, float], str, Callable[[Axes], None]]] = [
        (
            "perplexity",
            (6.4, 4.0),
            "Perplexity by decoder blocks pruned, from the first",
            lambda axes: draw_perplexity(axes, runs, look),
        ),
        (
            "decoder-error",
            (6.4, 4.0),
            "Relative error of the hidden states after each decoder block, against the dense model",
            lambda axes: draw_decoder_error(axes, runs, look),
        ),
        (
            "sublayers",
            (7.6, 4.0),
            "Relative output error by sublayer, on the inputs of the pruned model",
            lambda axes: draw_sublayers(axes, runs, look),
        ),
        (
            "time",
            (7.0, 1.1 + 0.5 * len(runs)),
            "Seconds for the whole model",
            lambda axes: draw_time(axes, runs, look),
        ),
    ]
    pair = pair_of(runs, wanted)
    if pair is not None:
        jobs += [
            (
                "scatter",
                (5.6, 5.6),
                f"Error of every linear: {pair[1].label} against {pair[0].label}",
                lambda axes: draw_scatter(axes, *pair),
            ),
            (
                "gain",
                (8.0, 3.2),
                f"Where {pair[1].label} has a lower error than {pair[0].label}",
                lambda axes: draw_gain(axes, *pair),
            ),
        ]
    made = []
    for name, size, caption, draw in jobs:
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.grid(visible=True, color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        path = folder / f"{name}-{_file_name(pattern)}.png"
        figure.savefig(path)
        made.append((path, caption))
    return made


def _file_name(pattern: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in pattern)


def table(runs: Sequence[Run]) -> str:
    """The figures of the runs of one pattern, in Markdown."""
    lines = [
        "| method | perplexity | median error of a linear | error after the last block | solver s | all s |",
        "|---|---|---|---|---|---|",
    ]
    best = min(run.summary["perplexity"] for run in runs)
    for run in runs:
        perplexity = f"{run.summary['perplexity']:.2f}"
        if run.summary["perplexity"] == best:
            perplexity = f"**{perplexity}**"
        lines.append(
            f"| {run.label} | {perplexity} | {run.linears['error'].median():.4f} | "
            f"{run.blocks['error'].iloc[-1]:.4f} | {_seconds(run.summary['solver_seconds'])} | "
            f"{_seconds(run.summary['seconds'])} |"
        )
    return "\n".join(lines)


def origin(runs: Sequence[Run]) -> list[str]:
    """Where the figures come from: once if it is the same for all runs, else by method."""
    told = {}
    for run in runs:
        s = run.summary
        told[run.method] = (
            f"calibration {s['calibration']}; perplexity of {s['text']}, dense {s['dense_perplexity']:.2f}; "
            f"{s['blocks']} blocks, {s['layers']} linears; damp {s['settings']['damp']}; {s['device']}, "
            f"torch {s['versions']['torch']}, {s['date']}"
        )
    if len(set(told.values())) == 1:
        return [next(iter(told.values())) + "."]
    return [f"- {method}: {text}" for method, text in told.items()]


def report(model: str, runs: Sequence[Run], wanted: Sequence[str] | None, folder: Path) -> Path:
    """Draw all pictures and write ``report.md``; returns its path."""
    look = looks(runs)
    text = [f"# {model}: one-shot pruning", "", *origin(runs), ""]
    for pattern in dict.fromkeys(run.pattern for run in runs):
        some = [run for run in runs if run.pattern == pattern]
        text += [f"## {pattern}", "", table(some), ""]
        for path, caption in pictures(some, pattern, look, wanted, folder):
            text += [f"![{caption}]({path.name})", "", f"*{caption}.*", ""]
    commands = dict.fromkeys(run.summary["command"] for run in runs)
    text += [
        "## Commands",
        "",
        "```sh",
        *(f"python bench/{command}" for command in commands),
        "```",
    ]
    path = folder / "report.md"
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def main(given: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the --out folder of prune_gpt.py")
    parser.add_argument("--model", required=True, help="the model's name, as in the results")
    parser.add_argument(
        "--compare", nargs=2, metavar="METHOD", help="for the scatter and the map [SparseGPT, best]"
    )
    parser.add_argument("--out", type=Path, help="folder of the report [RESULTS/MODEL/report]")
    args = parser.parse_args(given)
    runs = read(args.results, args.model)
    for name in args.compare or []:
        if name not in {run.method for run in runs}:
            parser.error(f"no results of {name!r}; there are {', '.join(r.method for r in runs)}")
    folder = args.out or args.results / short_name(args.model) / "report"
    path = report(short_name(args.model), runs, args.compare, folder)
    print(f"wrote {path} and its pictures")
    return path


if __name__ == "__main__":
    main()
