"""The files of a compressed model in a folder: how they are found and written.

The layout is that of Hugging Face: ``model.safetensors``, or shards with an index, beside ``config.json``,
whose ``quantization_config`` names the pattern of every sparse weight (:func:`quantization`). Each file's
metadata holds the description and the checksums of :func:`s3tensor.io.state.flatten_state` for the whole
model, so that the files are one state, however it was split.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from s3tensor.errors import CheckpointError
from s3tensor.files import first_line, lock_file, write_atomically, write_json
from s3tensor.io.state import (
    METADATA_KEY,
    flatten_state,
    open_weights,
    without_shared_storage,
    write_tensors,
)
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.int8 import Int8SparseTensor

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_WEIGHTS = "s3tensor.safetensors"  # of earlier versions; only s3tensor reads it
METHOD = "s3"  # the name of s3tensor among the quantization methods of transformers
FORMAT = 1  # of the entry in config.json

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_STAGE = ".saving-"  # prefix of a folder of files that are not in place yet
_SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # as transformers reads them
_MAX_JSON = 2**28  # bytes; a larger file is neither an index nor a config


def quantization(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The ``quantization_config`` of a state dict: what transformers must know to load its sparse weights.

    ``patterns`` names the pattern of every sparse weight, ``definitions`` spells these names out,
    ``transposed`` lists the weights that are transposed views, and ``int8``, where there are any, those with
    int8 values. Shapes come from the model.
    """
    definitions: dict[str, str] = {}
    patterns: dict[str, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Compressed):
            label, parts = str(tensor.pattern), tensor.pattern.parts
            if definitions.setdefault(label, parts) != parts:  # two patterns with one name
                label = parts
                definitions[label] = parts
            patterns[name] = label
    entry = {
        "quant_method": METHOD,
        "format": FORMAT,
        "definitions": definitions,
        "patterns": patterns,
        "transposed": [name for name in patterns if getattr(state[name], "transposed", False)],
    }
    int8 = [name for name in patterns if isinstance(state[name], Int8SparseTensor)]
    return {**entry, "int8": int8} if int8 else entry


def tied_names(model: nn.Module) -> set[str]:
    """The weights that a model of transformers ties to others by itself."""
    return set(getattr(model, "all_tied_weights_keys", ()))


def unshared_state(model: nn.Module, spare: set[str] | None = None) -> dict[str, Tensor]:
    """The state dict with each storage once: tied weights keep their first name.

    Args:
        spare: the names that may be left out; ``None`` is any. What a user's code has tied, a model made
            from its configuration does not tie.
    """
    seen: set[object] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = tensor.packed if isinstance(tensor, Compressed) else tensor
        address = 0 if first.is_meta else first.data_ptr()  # 0 when empty
        key = (address, tuple(tensor.shape), tensor.stride()) if address else name
        if key not in seen or (spare is not None and name not in spare):
            seen.add(key)
            state[name] = tensor.detach()
    return state


def compressed_files(folder: Path) -> list[Path]:
    """The files of a compressed model's weights; an empty list in a folder without one.

    Raises:
        CheckpointError: a damaged index.
    """
    files = [folder / WEIGHTS]
    if not files[0].is_file():
        files = _indexed(folder / INDEX) if (folder / INDEX).is_file() else []
    if files and (_says_compressed(folder / "config.json") or _described(files[0])):
        return files
    return [folder / OLD_WEIGHTS] if (folder / OLD_WEIGHTS).is_file() else []


def shard_bytes(size: int | str | None) -> int:
    """The largest file of weights in bytes, from a number or a size such as ``"5GB"``; None is no limit.

    Raises:
        CheckpointError: not a size, or not above 0.
    """
    if size is None:
        return 2**63 - 1
    try:
        unit = _SIZES[size.strip()[-2:].upper()] if isinstance(size, str) else 1
        number = int(float(size.strip()[:-2]) * unit) if isinstance(size, str) else int(size)
    except (KeyError, ValueError, TypeError, OverflowError):
        number = 0
    if number <= 0:
        raise CheckpointError(
            f'max_shard_size={size!r:.40} is not a size; give bytes above 0, a size such as "5GB" (units '
            f"{', '.join(_SIZES)}), or None for one file"
        )
    return number


@contextlib.contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder for the files of a model, moved into ``folder`` when all are written.

    If that fails or is interrupted, the old model is still whole and nothing of the new one is there. What a
    killed process left is deleted by the next save.

    Raises:
        CheckpointError: a file cannot be moved into place or deleted, with the system's reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_STAGE}*"):
        with _folder_lock(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_STAGE, dir=folder) as stage, _folder_lock(Path(stage)):
        yield Path(stage)
        found = sorted(path for path in Path(stage).rglob("*") if path.is_file())
        # The weights last, and their index after them: a folder with it is complete.
        found.sort(key=lambda path: (path.suffix == ".safetensors") + 2 * (path.name == INDEX))
        for path in found:  # before the moves, as it takes long
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        for path in found:
            write_atomically(folder / path.relative_to(stage), partial(os.replace, path))
        names = {path.name for path in found}
        for path in _old_files(folder, names) if names & {WEIGHTS, INDEX} else ():
            try:
                path.unlink()
            except OSError as error:
                raise CheckpointError(
                    f"cannot delete the model that was replaced ({error})"
                ) from error


@contextlib.contextmanager
def _folder_lock(stage: Path) -> Iterator[bool]:
    """Lock a folder until the exit, or the end of the process; False if it is locked or cannot be."""
    handle, held = None, False
    with contextlib.suppress(OSError):  # locked by another; on Windows and some file systems
        handle = os.open(stage, os.O_RDONLY)
        lock_file(handle)
        held = True
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def write_files(
    folder: Path,
    state: Mapping[str, Tensor],
    largest: int,  # bytes of a file, by :func:`shard_bytes`
) -> str:
    """Write a state dict into a :func:`staging_folder`; returns the name of the file, or of the index.

    The same state gives the same bytes.

    Raises:
        OSError, SafetensorError: a file cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors, description = flatten_state(state, "cpu", checksums=True)
    tensors = without_shared_storage(tensors)
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    for file, names in plan.filename_to_tensors.items():
        metadata = {"format": "pt", METADATA_KEY: description}
        write_tensors(folder / file, {name: tensors[name] for name in names}, metadata)
    if not plan.is_sharded:
        return WEIGHTS
    total = sum(tensor.nbytes for tensor in tensors.values())
    places = dict(sorted(plan.tensor_to_filename.items()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return INDEX


def _old_files(folder: Path, kept: set[str]) -> list[Path]:
    patterns = ("model*.safetensors", INDEX, OLD_WEIGHTS, "pytorch_model*")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.name not in kept)


def _indexed(index: Path) -> list[Path]:
    """The files that an index names, which must be beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map; get it again")
    odd = [
        file for file in places.values() if not isinstance(file, str) or not _SHARD.fullmatch(file)
    ]
    if odd:
        raise CheckpointError(f"{index} names {odd[0]!r:.80}, which is not the name of a shard")
    return [index.parent / file for file in sorted(set(places.values()))]


def _says_compressed(config: Path) -> bool:
    try:
        entry = read_json(config).get("quantization_config")
    except CheckpointError:
        return False  # the weights will tell
    return isinstance(entry, dict) and entry.get("quant_method") == METHOD


def _described(file: Path) -> bool:
    try:
        with open_weights(file) as (_, description):
            return description is not None
    except CheckpointError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        CheckpointError: a file that is missing, damaged, too large or not an object.
    """
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is too large for a config or an index")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object")
    return found
