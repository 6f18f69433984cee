"""Compressed safetensors: a state dict with structured-sparse tensors in one flat, checked file.

A sparse tensor ``name`` becomes the plain tensors ``name.packed`` and ``name.indices``; its pattern
(spelled out in parts), shape and orientation, and a SHA-256 of every stored tensor, are JSON in the
file's metadata, behind a SHA-256 of that JSON. No pickle is read or written, and every size is
checked before memory is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s3tensor.errors import CheckpointError, PatternError
from s3tensor.packing import check_packed
from s3tensor.pattern import Pattern
from s3tensor.tensor import StructuredSparseTensor

FORMAT = 1
METADATA_KEY = "s3tensor"
TEMPORARY = ".tmp"  # end of the name of a file that is being written

# Limits on what a file may claim; what is beyond them is an attack or damage. A few bytes can describe
# a weight of any size, which ``to_dense`` would then allocate.
_MAX_NDIM, _MAX_DIM = 8, 2**40
_MAX_ELEMENTS = (
    2**28
)  # a weight may have these, or _MAX_EXPANSION for each stored value if that is more
_MAX_EXPANSION = 1024


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict to ``path`` atomically: the file is whole and checked, or it is not there.

    The same state gives the same bytes. Tensors that share storage are stored once for each name;
    drop tied names before.

    Raises:
        CheckpointError: when the file cannot be written, with the system's reason, or when a name is
            also that of a part of a sparse tensor.
    """
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict[str, Any]] = {}
    stored: set[int] = set()  # addresses: safetensors refuses tensors that share storage
    for name, tensor in state.items():
        parts = {name: tensor}
        if isinstance(tensor, StructuredSparseTensor):
            parts = dict(zip((f"{name}.packed", f"{name}.indices"), tensor.parts(), strict=True))
            sparse[name] = {
                "pattern": tensor.pattern.parts,
                "label": str(tensor.pattern),
                "shape": list(tensor.bound.shape),
                "transposed": tensor.transposed,
            }
        for key, part in parts.items():
            if key in tensors:
                raise CheckpointError(f"two tensors would be stored as {key!r}; rename one of them")
            whole = part.detach().cpu().contiguous()
            address = whole.untyped_storage().data_ptr()
            tensors[key] = whole.clone() if address in stored else whole
            stored.add(address)
    document = {
        "format": FORMAT,
        "sparse": sparse,
        "sha256": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(document)
    # One entry of metadata: safetensors writes several in an order that changes from run to run.
    metadata = {METADATA_KEY: f"{_digest(text)} {text}"}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_state(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what :func:`save_state` wrote; every checksum and every index is verified.

    Raises:
        CheckpointError: a file that is missing, truncated, altered, or not of this format.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            document = _document(file.metadata(), path)
            names = set(file.keys())
            if names != set(document["sha256"]):
                odd = sorted(names ^ set(document["sha256"]))
                raise CheckpointError(
                    f"{path}: tensor {odd[0]!r} is missing, or not in the checksums"
                )
            tensors: dict[str, Tensor] = {}
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no dict
                tensors[name] = file.get_tensor(name)
                if checksum(tensors[name]) != document["sha256"][name]:
                    raise CheckpointError(
                        f"{path}: the checksum of {name!r} fails; the file was altered"
                    )
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        # The last three: a type name that safetensors knows and this version of torch does not.
        raise CheckpointError(
            f"{path} is truncated or altered ({first_line(error)}); get it anew"
        ) from error
    state: dict[str, Tensor] = {}
    for name, fields in document["sparse"].items():
        state[name] = _sparse(f"{path}: {name}", name, fields, tensors).to(device)
    for name, tensor in tensors.items():
        if name in state:
            raise CheckpointError(f"{path}: {name!r} is there twice, dense and sparse")
        state[name] = tensor.to(device)
    return state


def _document(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    entry = (metadata or {}).get(METADATA_KEY)
    if entry is None:
        raise CheckpointError(f"{path} is no s3tensor file: its metadata lacks {METADATA_KEY!r}")
    digest, _, text = entry.partition(" ")
    if digest != _digest(text):
        raise CheckpointError(f"{path}: the checksum of its metadata fails; the file was altered")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error})") from None
    known = document.get("format") if isinstance(document, dict) else None
    if type(known) is not int or known != FORMAT:
        raise CheckpointError(
            f"{path} has format {known!r:.40}, this version of s3tensor reads {FORMAT}; update s3tensor"
        )
    if not all(isinstance(document.get(key), dict) for key in ("sparse", "sha256")):
        raise CheckpointError(f"{path}: metadata lacks 'sparse' or 'sha256'")
    return document


def _sparse(
    where: str, name: str, fields: Any, tensors: dict[str, Tensor]
) -> StructuredSparseTensor:
    """One sparse tensor, its two parts taken out of ``tensors``; nothing in ``fields`` is trusted."""
    try:
        shape, transposed = tuple(fields["shape"]), fields["transposed"]
        sound = len(shape) <= _MAX_NDIM and all(type(n) is int and 0 < n < _MAX_DIM for n in shape)
        if not sound or type(transposed) is not bool or (transposed and len(shape) != 2):
            raise CheckpointError(
                f"{where}: shape {shape!r:.80} or orientation {transposed!r:.20} is damaged"
            )
        packed, indices = tensors.pop(f"{name}.packed"), tensors.pop(f"{name}.indices")
        if math.prod(shape) > max(_MAX_ELEMENTS, _MAX_EXPANSION * packed.numel()):
            raise CheckpointError(
                f"{where}: shape {shape} for {packed.numel()} stored values is damaged"
            )
        pattern = _labelled(Pattern.parse(fields["pattern"]), fields.get("label"))
        bound = pattern.bind(shape)
        check_packed(packed, indices, bound, where)
        tensor = StructuredSparseTensor.from_packed(packed, indices, pattern, shape)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{where}: damaged description of a sparse tensor ({first_line(error)})"
        ) from None
    return tensor.map_parts(lambda part: part, flip=True) if transposed else tensor


def _labelled(pattern: Pattern, label: object) -> Pattern:
    """The pattern under its short name, where that name still means the same here."""
    try:
        named = Pattern.parse(label) if isinstance(label, str) else pattern
    except PatternError:
        return pattern
    return named if named == pattern else pattern


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes in row-major order, as hex."""
    flat = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call ``write(temporary)`` beside ``path``, then put the file in place in one step.

    Raises:
        CheckpointError: with the system's reason; what was at ``path`` is there still.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
        os.close(handle)
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path} ({first_line(error)}); free space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)  # gone already when all went well


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be synced (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, its keys in the order given.

    Raises:
        CheckpointError: when it cannot be written, with the system's reason.
    """
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind when it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
