"""Faults survived: runs killed at random moments, and checkpoints with changed bytes.

    python bench/faults.py --kills 100 --fuzz 20000     # ten minutes on one core; Linux

*Kills.* ``s3tensor prune`` of a toy model is killed by SIGKILL at a random moment and started again with the
same command, which may be killed again, until it ends. Two moments in three are drawn from the whole run, the
third from the time in which it saves the model and cleans up. Every file of the result is then compared, byte
by byte, with that of an undisturbed run; in the two CSV files, all columns but seconds and memory are. Each
run is forked from a process that has imported everything, so that kills hit the work and not the imports.

*Fuzz.* The bytes of a checkpoint that holds every kind of tensor are changed at random and loaded, under a
limit of 1 GiB of address space more than before:

- ``bytes``: one to eight bytes changed, anywhere or in the header.
- ``splices``: a run of bytes cut out, doubled, zeroed, or the file cut short.
- ``forged``: bytes changed in the description or the tensors, and all checksums recomputed, as an attacker
  would. Here a sound weight of another pattern is not a fault: it is what the file says.

A case must be refused with a ``CheckpointError`` or load what was saved. Anything else is listed as a fault.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import datetime
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has only the thread that forked
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
from measure import RESULTS, ROOT, device_name, versions, write_json

sys.path.append(str(ROOT / "tests"))  # for the toy models and states of the tests
import mixed_state as laws
from limits import little_memory
from saved_models import byte_level

import s3tensor as s3
from s3tensor import cli, llm
from s3tensor.io import pretrained as hf
from s3tensor.io import state as checkpoint
from s3tensor.io.state import METADATA_KEY, load_state

UNLIKE = ("seconds", "solver_seconds", "recovery_seconds", "peak_memory_bytes")  # in two runs
ENDED = "after it ended, before the process had"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="results of killed runs to compare")
    parser.add_argument("--fuzz", type=int, default=20_000, help="files to change and load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    args = parser.parse_args()

    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "device": device_name("cpu"),
        "versions": versions("torch", "transformers", "safetensors"),
        "seed": args.seed,
    }  # fmt: skip
    parts: dict[str, Callable[[], dict[str, Any]]] = {}
    if args.fuzz:
        parts["fuzz"] = lambda: fuzzed(args.fuzz, args.seed)
    if args.kills:
        parts["kills"] = lambda: killed(args.kills, args.seed)
    for name, part in parts.items():
        record[name] = part()
        write_json(args.out, record)
        print(f"{name}: {json.dumps(record[name])}", flush=True)
    if record.get("fuzz", {}).get("faults") or record.get("kills", {}).get("different"):
        sys.exit(1)


# kills ------------------------------------------------------------------------------------------------


def killed(kills: int, seed: int) -> dict[str, Any]:
    """Runs killed at random moments, and how many of their results equal that of an undisturbed run."""
    draw = random.Random(seed)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder)
        model, text = folder / "model", folder / "text.txt"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            prune(model, text, folder / "first")  # imports all that is imported when first used

        def run(out: Path) -> int:
            return start(lambda: prune(model, text, out), folder / "log")

        times = []
        for name in ("whole", "twin"):
            before = time.perf_counter()
            wait(run(folder / name), folder / "log")
            times.append(time.perf_counter() - before)
        expected = contents(folder / "whole")
        assert contents(folder / "twin") == expected, "two undisturbed runs differ"

        done, results, equal, early = 0, 0, 0, 0
        stages: collections.Counter[str] = collections.Counter()
        different: list[str] = []
        while results < kills:
            out = folder / f"run{results}"
            of_this = 0
            while True:
                process = run(out)
                # Once in any case, then half of the time, so that chains of kills occur.
                if of_this == 0 or draw.random() < 0.5:
                    saving = draw.random() < 1 / 3
                    seconds = draw.uniform(0, 0.02 if saving else max(times))
                    if kill_after(process, seconds, out if saving else None, folder / "log"):
                        of_this += 1
                        where = stage(out)
                        stages[where] += 1
                        if where == ENDED:
                            break  # the model is there: the command would refuse to overwrite it
                        continue
                    early += 1  # it had ended before
                else:
                    wait(process, folder / "log")
                break
            done += of_this
            if of_this == 0:
                shutil.rmtree(out)
                continue  # not killed: no result to count
            found = contents(out)
            results += 1
            equal += found == expected
            different += [
                f"{out.name}: {name}"
                for name in sorted({*found, *expected})
                if found.get(name) != expected.get(name)
            ]
            print(f"{done} kills, {results} results, {equal} equal", flush=True)
    return {
        "kills": done,
        "killed": dict(sorted(stages.items())),
        "ended_before_the_kill": early,
        "results": results,
        "equal": equal,
        "different": different,
        "files": len(expected),
        "bytes": sum(len(data) for data in expected.values()),
        "seconds_of_a_run": round(sum(times) / len(times), 2),
        "seconds": round(time.perf_counter() - started),
    }


def prune(model: Path, text: Path, out: Path) -> None:
    """What a user types, in this process."""
    cli.main(
        ["prune", str(model), "--pattern", "2:4", "--calibration", str(text), "--samples", "8",
         "--seq-len", "32", "--eval-samples", "2", "--out", str(out)],
    )  # fmt: skip


def make_model(folder: Path) -> None:
    """A random Llama of four blocks with a tokenizer, in ``model``, and text in ``text.txt``."""
    text = llm.load_text("pydoc")[:20_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    fast = byte_level(300, text)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(fast), max_position_embeddings=64,
    )  # fmt: skip
    hf.save_pretrained(transformers.LlamaForCausalLM(config), folder / "model", fast, dense=True)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run left, by file; of CSV files all but seconds and memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "run.lock":  # of a process that was killed; empty
            data = path.read_bytes()
            found[str(path.relative_to(folder))] = (
                without_measures(data) if path.suffix == ".csv" else data
            )
    return found


def without_measures(data: bytes) -> bytes:
    rows = list(csv.DictReader(io.StringIO(data.decode())))
    kept = [{k: v for k, v in row.items() if k not in UNLIKE} for row in rows]
    return json.dumps(kept).encode()


def stage(out: Path) -> str:
    """Where a run was when it was killed, by what it left."""
    if not out.exists() or not (out / "run.json").exists():
        return ENDED if is_saving(out) else "before it began"
    blocks = len(list(out.glob("block-*.json")))
    return "while it saves or tidies up" if is_saving(out) else f"after {blocks} blocks"


def is_saving(out: Path) -> bool:
    """Whether files of the whole model are in the folder, written or about to be."""
    names = ("*config.json", "*model*", ".saving-*")
    return any(path for name in names for path in out.glob(name))


def start(work: Callable[[], None], log: Path) -> int:
    """A forked process that does ``work``, its output in ``log``; the process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        os._exit(code)


def wait(process: int, log: Path) -> None:
    _, status = os.waitpid(process, 0)
    if status:
        raise SystemExit(f"a run failed ({status}): {log.read_text()[-2000:]}")


def kill_after(process: int, seconds: float, saving: Path | None, log: Path) -> bool:
    """Whether the process was still at work after so long, and was killed then.

    With ``saving``, the time counts from the moment when the model's files begin to appear in that folder.
    """
    until = math.inf if saving else time.perf_counter() + seconds
    while time.perf_counter() < until:
        if saving and until == math.inf and is_saving(saving):
            until = time.perf_counter() + seconds
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"a run failed ({status}): {log.read_text()[-2000:]}")
            return False
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


# fuzz -------------------------------------------------------------------------------------------------


def fuzzed(cases: int, seed: int) -> dict[str, Any]:
    """Counts of what became of changed checkpoints, by the kind of change."""
    whole, state = laws.mixed_bytes(), laws.mixed_state()
    draw = random.Random(seed)
    counts: dict[str, collections.Counter[str]] = {}
    faults: list[str] = []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, little_memory():
        path = Path(temporary) / "x"
        for case in range(cases):
            kind = ("bytes", "splices", "forged")[case % 3]
            data = {"bytes": with_bytes, "splices": with_splice, "forged": with_forgery}[kind](
                whole, draw
            )
            path.write_bytes(data)
            try:
                found = load_state(path)
            except s3.CheckpointError:
                outcome = "refused"
            except Exception as error:
                outcome = "fault"
                faults.append(f"case {case}, {kind}: {type(error).__name__}: {error}"[:300])
            else:
                if laws.equal_states(found, state):
                    outcome = "as it was saved"
                elif kind == "forged" and all(is_sound(tensor) for tensor in found.values()):
                    outcome = "another sound state"
                else:
                    outcome = "fault"
                    faults.append(f"case {case}, {kind}: another tensor was loaded")
            counts.setdefault(kind, collections.Counter())[outcome] += 1
    return {
        "cases": cases,
        "outcomes": {kind: dict(sorted(found.items())) for kind, found in counts.items()},
        "faults": faults,
        "bytes_of_the_file": len(whole),
        "seconds": round(time.perf_counter() - started),
    }


def is_sound(tensor: torch.Tensor) -> bool:
    """Whether a compressed weight satisfies its pattern; anything dense is what the file says."""
    if not isinstance(tensor, s3.StructuredSparseTensor):
        return True
    upright = tensor.t() if tensor.transposed else tensor
    dense = upright.to_dense()
    return tuple(dense.shape) == tuple(upright.shape) and s3.satisfies(dense, tensor.pattern)


def header_of(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def with_bytes(whole: bytes, draw: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.randint(1, 8)):
        end = draw.choice((8, header_of(whole), len(whole)))
        data[draw.randrange(end)] = draw.choice((draw.randrange(256), 0, 255, 34, 48, 57))
    return bytes(data)


def with_splice(whole: bytes, draw: random.Random) -> bytes:
    end = draw.choice((header_of(whole), len(whole)))
    first, last = sorted((draw.randrange(end), draw.randrange(end)))
    last = min(last, first + draw.choice((1, 8, 64, 4096)))
    run = whole[first:last]
    change = draw.choice(("cut out", "doubled", "zeroed", "cut short"))
    if change == "cut short":
        return whole[:first]
    middle = {"cut out": b"", "doubled": run * 2, "zeroed": bytes(len(run))}[change]
    return whole[:first] + middle + whole[last:]


def with_forgery(whole: bytes, draw: random.Random) -> bytes:
    """Changed description or tensors, with checksums and sizes that hold."""
    end = header_of(whole)
    header = json.loads(whole[8:end])
    body = bytearray(whole[end:])
    document = json.loads(header["__metadata__"][METADATA_KEY].split(" ", 1)[1])
    for _ in range(draw.randint(0, 3)):
        body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            document["sha256"][name] = sum_of(bytes(body[first:last]), entry)
    text = json.dumps(document)
    if draw.random() < 0.8:
        start = text.index('"sparse"')
        for _ in range(draw.randint(1, 3)):
            where = draw.randrange(start, len(text))
            text = text[:where] + draw.choice('0123456789:;=,.-()[]{}@ "emnpt') + text[where + 1 :]
    header["__metadata__"][METADATA_KEY] = f"{checkpoint._digest(text)} {text}"
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + bytes(body)


def sum_of(data: bytes, entry: dict[str, Any]) -> str:
    """The checksum of a stored tensor, from its bytes, dtype and shape."""
    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "U8": torch.uint8,
             "BF16": torch.bfloat16, "I64": torch.int64, "BOOL": torch.bool}[entry["dtype"]]  # fmt: skip
    raw = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(0, dtype=torch.uint8)
    )
    return checkpoint.checksum(raw.view(dtype).reshape(entry["shape"]))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
