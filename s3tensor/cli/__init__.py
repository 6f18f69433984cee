"""The command line, a file for each command.

Bad input ends in one line and an exit code: 2 for a command that cannot be meant so, 1 for one that fails,
130 when it is interrupted.
"""

from __future__ import annotations

from s3tensor.cli import bench, compare, convert, evaluate, prune, show, verify
from s3tensor.cli.group import main

__all__ = ["bench", "compare", "convert", "evaluate", "main", "prune", "show", "verify"]
