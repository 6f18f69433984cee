"""The command line, one file per command.

Errors are one line on stderr and an exit code: 2 for wrong usage, 1 for a command that fails, 130 for an
interrupt.
"""

from __future__ import annotations

from s3tensor.cli import bench, compare, convert, evaluate, prune, show, verify
from s3tensor.cli.group import main

__all__ = ["bench", "compare", "convert", "evaluate", "main", "prune", "show", "verify"]
