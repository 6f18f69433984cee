"""The transcript of a new user (tools/transcript.py): what it leaves out, and its page."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def transcript() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transcript", ROOT / "tools" / "transcript.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_output_is_left_without_colours_bars_dates_and_paths(transcript: ModuleType) -> None:
    output = (
        "\x1b[1mpruned\x1b[0m 210\r\n\n\n"
        "Loading:  50%|#####     | 1/2 [00:00<00:00, 9.1it/s]\rdone\n"
        "Loading: 100%|##########| 2/2 [00:00<00:00, 9.1it/s]\n"
        "2026-01-02:03:04:05 INFO     [x:1] kept\n"
        "/a/new/env/bin and /a/new\n"
    )
    assert transcript.clean(output, {"/a/new": "~"}) == [
        "pruned 210",
        "",
        "done",
        "INFO     [x:1] kept",
        "~/env/bin and ~",
    ]


def test_the_last_lines_say_how_many_are_left_out(transcript: ModuleType) -> None:
    assert transcript.last(["a", "b"], 2) == ["a", "b"]
    assert transcript.last(["a", "b", "c"], 2) == ["... 1 lines", "b", "c"]


def test_the_page_shows_the_commands_of_the_script_and_none_failed(transcript: ModuleType) -> None:
    page = transcript.PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(transcript.COMMANDS)
    for block, command in zip(blocks, transcript.COMMANDS, strict=True):
        assert block.startswith(transcript.prompted(command.typed) + "\n")
    assert "exit code" not in page and "Traceback" not in page


def test_the_commands_of_the_readme_are_in_the_transcript(transcript: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    model = readme.split("## A whole model")[1].split("\nor in Python")[0]
    typed = "\n".join(command.typed for command in transcript.COMMANDS)
    commands = re.findall(r"^s3tensor (\w+) ", model, re.MULTILINE)
    assert {"prune", "verify", "eval", "compare", "convert"} <= set(commands)
    for command in commands:
        assert f"s3tensor {command} " in typed
