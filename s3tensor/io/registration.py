"""Register s3tensor with transformers and peft as soon as a program has imported both, in either order."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def watch() -> None:
    """Register with transformers and peft: now if they have their tables, else when they make them.

    Importing transformers here would cost seconds. So a finder waits for the one module that makes a table,
    finds it as the others do, and registers after the module's own code has run; then it removes itself.
    """
    for module, (name, register) in _TABLES.items():
        if hasattr(sys.modules.get(module), name):
            register()
        elif not any(isinstance(f, _Watch) and f.module == module for f in sys.meta_path):
            sys.meta_path.insert(0, _Watch(module, register))


class _Watch(MetaPathFinder):
    def __init__(self, module: str, register: Callable[[], None]) -> None:
        self.module, self.register = module, register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
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
            self.register()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register_transformers() -> None:
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


def _register_peft() -> None:
    try:
        importlib.import_module("s3tensor.train.lora").register_with_peft()
    except Exception as error:
        warnings.warn(
            f"s3tensor cannot register with peft ({error}): load adapters that were trained under masks with "
            "config=s3tensor.lora_config(LoraConfig.from_pretrained(folder))",
            stacklevel=2,
        )


# The module that makes a table, a name that it has by then, and what registers there.
_TABLES: dict[str, tuple[str, Callable[[], None]]] = {
    "transformers.quantizers.auto": ("register_quantizer", _register_transformers),
    "peft": ("PEFT_TYPE_TO_CONFIG_MAPPING", _register_peft),
}
