"""Register s3tensor with transformers as soon as a program has imported both, in either order."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.quantizers.auto"  # holds the table of quantization methods


def watch() -> None:
    """Register with transformers: now if it has its table of quantization methods, else when it makes it.

    Importing transformers here would cost seconds. So a finder waits for the one module that makes the table,
    finds it as the others do, and registers after the module's own code has run; then it removes itself.
    """
    if hasattr(sys.modules.get(_AUTO), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    """Register; a version of transformers that refuses must still be importable."""
    try:
        importlib.import_module(
            "s3tensor.io.transformers_quantizer"
        )  # which registers, or is doing so
    except Exception as error:
        warnings.warn(
            f"s3tensor cannot register with transformers ({error}): load compressed models with "
            "s3tensor.from_pretrained",
            stacklevel=2,
        )
