"""A run that survives being killed: each finished block is on disk before the next one starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s3tensor.checkpoint import load_state, save_state, write_json
from s3tensor.errors import CheckpointError
from s3tensor.llm.report import BLOCKS_CSV, LINEARS_CSV, BlockRow, LinearRow, write_rows

_RUN = "run.json"


class RunFolder:
    """The folder of one pruning run: its settings, and a file and rows for each finished block.

    Args:
        folder: made if it is not there.
        settings: what the run depends on. A folder that was begun with others is refused.

    Raises:
        CheckpointError: a folder of another run, or one that cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        path = folder / _RUN
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if path.exists():
            _same_settings(path, settings)
        else:
            write_json(path, settings)

    def finished(self, block: int) -> bool:
        """True when the block is on disk."""
        return self._rows_path(block).exists()

    def save(
        self, block: int, module: nn.Module, row: BlockRow, linears: Sequence[LinearRow]
    ) -> None:
        """Write one finished block, then its rows; the rows' file marks it as finished."""
        save_state(self._state_path(block), dict(module.state_dict()))
        write_json(
            self._rows_path(block),
            {"block": vars(row), "linears": [vars(linear) for linear in linears]},
        )
        self._write_csv()

    def _write_csv(self) -> None:
        """The CSV files, anew from every finished block: right whenever the run was broken off."""
        blocks: list[BlockRow] = []
        linears: list[LinearRow] = []
        for path in sorted(self.folder.glob("block-*.json")):
            row, rows = _read_rows(path)
            blocks.append(row)
            linears.extend(rows)
        write_rows(self.folder / BLOCKS_CSV, blocks, BlockRow)
        write_rows(self.folder / LINEARS_CSV, linears, LinearRow)

    def load(self, block: int, module: nn.Module) -> tuple[BlockRow, list[LinearRow]]:
        """Put a finished block's weights into ``module`` and return its rows.

        Raises:
            CheckpointError: damaged files.
        """
        device = next(module.parameters()).device
        state = load_state(self._state_path(block), device)
        row, linears = _read_rows(self._rows_path(block))
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{self._state_path(block)} does not fit the model ({error}); delete {self.folder} to start anew"
            ) from error
        module.requires_grad_(False)
        return row, linears

    def _state_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _rows_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"


def _read_rows(path: Path) -> tuple[BlockRow, list[LinearRow]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return BlockRow(**rows["block"]), [LinearRow(**linear) for linear in rows["linears"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete {path.parent} to start anew"
        ) from error


def check_out(folder: str | Path) -> None:
    """Refuse a folder for a new run that holds anything but an unfinished run.

    Raises:
        CheckpointError: a file, or a folder with other things in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _RUN).is_file():
        raise CheckpointError(
            f"{folder} exists and is not empty; nothing was overwritten: choose another folder"
        )


def forget_run(folder: str | Path) -> None:
    """Delete a finished run's blocks and settings once the model is saved elsewhere; CSV files stay."""
    folder = Path(folder)
    for pattern in ("block-*.safetensors", "block-*.json", _RUN):
        for path in folder.glob(pattern):
            path.unlink()


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete {path.parent} to start anew"
        ) from None
    for key in sorted({*found, *settings}):
        if found.get(key) != settings.get(key):
            raise CheckpointError(
                f"{path.parent} holds an unfinished run with {key} = {found.get(key)!r}, this one has "
                f"{settings.get(key)!r}; use the same settings to resume, or another folder"
            )


def fingerprint(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, str]:
    """Digests of what a run starts from: the model's shapes and a sample of its values, and the tokens."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)]
        weights.update(sample.double().cpu().numpy().tobytes())
    tokens = hashlib.sha256()
    for batch in batches:
        tokens.update(f"{tuple(batch.shape)}".encode())
        tokens.update(batch.cpu().contiguous().numpy().tobytes())
    return {"model": weights.hexdigest(), "calibration": tokens.hexdigest()}
