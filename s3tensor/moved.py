"""Old names of modules, for files that were written before these moved.

A pickle or a ``torch.save`` names the module of each class that it needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "s3tensor.compressed": "s3tensor.tensor.base",
    "s3tensor.coupled": "s3tensor.train.coupling",
    "s3tensor.hessian": "s3tensor.prune.hessian",
    "s3tensor.int8": "s3tensor.tensor.int8",
    "s3tensor.layout": "s3tensor.pattern.layout",
    "s3tensor.masked": "s3tensor.train.masked",
    "s3tensor.parametrize": "s3tensor.train.s3_sparse",
    "s3tensor.schedule": "s3tensor.train.schedule",
    "s3tensor.sparsify": "s3tensor.model.sparsify",
    "s3tensor.specs": "s3tensor.paper",
    "s3tensor.viewrule": "s3tensor.pattern.view_rule",
}


def watch() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


class _Moved(MetaPathFinder, Loader):
    """Finds a module by its old name: an empty module that looks names up in the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        new = importlib.import_module(MOVED[module.__name__])

        def look_up(name: str) -> Any:
            return getattr(new, name)

        module.__getattr__ = look_up  # type: ignore[method-assign]
