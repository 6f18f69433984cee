"""Runs that survive being killed: each finished block is on disk before the next one starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import CheckpointError
from s3tensor.files import LOCK, TEMPORARY, write_json
from s3tensor.io.state import load_state, save_state
from s3tensor.llm.report import BLOCKS_CSV, LINEARS_CSV, BlockRow, LinearRow, write_rows
from s3tensor.tensor.base import Compressed

_RUN = "run.json"
# Left by safetensors and tokenizers when killed while they write.
_OF_RUST = ".tmp" + "[0-9A-Za-z]" * 6


class RunFolder:
    """The folder of one pruning run: its settings, and a file and rows for each finished block.

    Args:
        folder: made if it is not there.
        settings: what the run depends on. A folder started with other settings is refused.

    Raises:
        CheckpointError: a folder of another run, or one that cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        path = folder / _RUN
        settings = json.loads(json.dumps(settings))  # as it will be read back
        self.resumes = path.exists()  # an interrupted run
        if self.resumes:
            _same_settings(path, settings)
            for leftover in (*_leftovers(folder), *folder.glob(_OF_RUST)):
                leftover.unlink(missing_ok=True)
            self._write_csv()  # the run may have been killed between a block and these
        else:
            write_json(path, settings)

    def finished(self, block: int) -> bool:
        """True when the block is on disk."""
        return self._rows_path(block).exists()

    def save(
        self, block: int, module: nn.Module, row: BlockRow, linears: Sequence[LinearRow]
    ) -> None:
        """Write one finished block, then its rows; the rows' file marks it as finished.

        Raises:
            CheckpointError: a folder that is gone or cannot be written.
        """
        if not (self.folder / _RUN).is_file():
            raise CheckpointError(
                f"{self.folder} or its {_RUN} vanished during the run; the finished blocks are lost: "
                "start again in another folder"
            )
        save_state(self._state_path(block), dict(module.state_dict()))
        write_json(
            self._rows_path(block),
            {"block": vars(row), "linears": [vars(linear) for linear in linears]},
        )
        self._write_csv()

    def _write_csv(self) -> None:
        """Rewrite the CSV files from every finished block: correct whenever the run was interrupted."""
        blocks: list[BlockRow] = []
        linears: list[LinearRow] = []
        for path in sorted(self.folder.glob("block-*.json")):
            row, rows = _read_rows(path)
            blocks.append(row)
            linears.extend(rows)
        write_rows(self.folder / BLOCKS_CSV, blocks, BlockRow)
        write_rows(self.folder / LINEARS_CSV, linears, LinearRow)

    def load(
        self, block: int, module: nn.Module
    ) -> tuple[dict[str, Tensor], BlockRow, list[LinearRow]]:
        """A finished block's tensors, by their names in ``module``, and its rows.

        Raises:
            CheckpointError: damaged files, or those of another block.
        """
        path = self._state_path(block)
        state = load_state(path)
        row, linears = _read_rows(self._rows_path(block))
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
            raise CheckpointError(
                f"{path} does not fit the model; delete {self.folder} to start again"
            )
        return state, row, linears

    def _state_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _rows_path(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"


def _leftovers(folder: Path) -> list[Path]:
    """Files whose writing was interrupted."""
    return list(folder.glob(f".*{TEMPORARY}"))


def _read_rows(path: Path) -> tuple[BlockRow, list[LinearRow]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return BlockRow(**rows["block"]), [LinearRow(**linear) for linear in rows["linears"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete {path.parent} to start again"
        ) from error


def check_out(folder: str | Path) -> None:
    """Refuse an output folder that holds anything but an unfinished run.

    Raises:
        CheckpointError: a file, or a folder with other things in it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    if not folder.is_dir() or (folder / _RUN).is_file():
        return
    unknown = {path.name for path in folder.iterdir()} - {LOCK}
    if unknown - {path.name for path in _leftovers(folder)}:
        raise CheckpointError(
            f"{folder} exists and is not empty; nothing was overwritten: choose another folder"
        )


def forget_run(folder: str | Path) -> None:
    """Delete a finished run's blocks and settings once the model is saved; CSV files stay.

    Raises:
        CheckpointError: a file that cannot be deleted.
    """
    folder = Path(folder)
    try:
        # Last block first, and a block's rows, which mark it as finished, before its tensors: what is left at
        # any moment is the start of a run. The settings last: until then the run can resume.
        for pattern in ("block-*.json", "block-*.safetensors", _RUN):
            for path in sorted(folder.glob(pattern), reverse=True):
                path.unlink()
    except OSError as error:
        raise CheckpointError(f"cannot delete what a finished run left ({error})") from None


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); delete {path.parent} to start again"
        ) from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged; delete {path.parent} to start again")
    for key in sorted({*found, *settings}):
        if found.get(key) != settings.get(key):
            raise CheckpointError(
                f"{path.parent} holds an unfinished run with {key} = {found.get(key)!r}, this one has "
                f"{settings.get(key)!r}; use the same settings to resume, or another folder"
            )


def fingerprint(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, str]:
    """Digests of a run's inputs: the model's shapes and a sample of its values, and the tokens."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        whole = parameter.detach()
        for part in whole.parts() if isinstance(whole, Compressed) else (whole,):
            sample = part.flatten()[:: max(1, part.numel() // 64)]
            weights.update(sample.double().cpu().numpy().tobytes())
    return {"model": weights.hexdigest(), "calibration": tokens_digest(batches)}


def tokens_digest(batches: Sequence[Tensor]) -> str:
    """A digest of token ids, whatever their integer dtype."""
    tokens = hashlib.sha256()
    for batch in batches:
        tokens.update(f"{tuple(batch.shape)}".encode())
        tokens.update(batch.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return tokens.hexdigest()
