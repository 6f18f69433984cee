"""Compressed safetensors: a state dict with structured-sparse tensors in one flat, checked file.

A sparse tensor ``name`` becomes the plain tensors ``name.packed`` and ``name.indices``; its pattern
(spelled out in parts), shape and orientation, and a SHA-256 of every stored tensor, are JSON in the
file's metadata. No pickle is read or written, and every size is checked before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
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
_MAX_DIM = 2**40  # far above any weight; a larger number in a file is an attack or damage


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict to ``path`` atomically: the file is whole and checked, or it is not there.

    Tensors that share storage are stored once for each name; drop tied names before.

    Raises:
        CheckpointError: when the file cannot be written, with the system's reason.
    """
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, StructuredSparseTensor):
            tensors[f"{name}.packed"] = tensor.packed.detach().cpu().contiguous()
            tensors[f"{name}.indices"] = tensor.indices.detach().cpu().contiguous()
            sparse[name] = {
                "pattern": tensor.pattern.parts,
                "label": str(tensor.pattern),
                "shape": list(tensor.bound.shape),
                "transposed": tensor.transposed,
            }
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    document = {
        "format": FORMAT,
        "sparse": sparse,
        "sha256": {name: checksum(tensor) for name, tensor in tensors.items()},
    }
    write_atomically(
        path,
        lambda temporary: save_file(
            tensors, temporary, {METADATA_KEY: json.dumps(document), "format": "pt"}
        ),
    )


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
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it is truncated or altered"
        ) from error
    state: dict[str, Tensor] = {}
    for name, fields in document["sparse"].items():
        state[name] = _sparse(name, fields, tensors).to(device)
    for name, tensor in tensors.items():
        state[name] = tensor.to(device)
    return state


def _document(metadata: Mapping[str, str] | None, path: Path) -> dict[str, Any]:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f"{path} is no s3tensor file: its metadata lacks {METADATA_KEY!r}")
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged metadata ({error})") from None
    known = isinstance(document, dict) and document.get("format")
    if known != FORMAT or isinstance(known, bool):
        raise CheckpointError(
            f"{path} has format {known!r}, this version of s3tensor reads {FORMAT}; update s3tensor"
        )
    if not all(isinstance(document.get(key), dict) for key in ("sparse", "sha256")):
        raise CheckpointError(f"{path}: metadata lacks 'sparse' or 'sha256'")
    return document


def _sparse(name: str, fields: Any, tensors: dict[str, Tensor]) -> StructuredSparseTensor:
    """One sparse tensor, its two parts taken out of ``tensors``; nothing in ``fields`` is trusted."""
    try:
        shape = tuple(fields["shape"])
        sound = all(type(n) is int and 0 < n < _MAX_DIM for n in shape)
        if not sound or type(fields["transposed"]) is not bool:
            raise CheckpointError(
                f"{name}: shape {shape} or orientation {fields['transposed']!r} is damaged"
            )
        pattern = Pattern.parse(fields["pattern"])
        label = fields.get("label")
        bound = pattern.bind(shape)
        packed, indices = tensors.pop(f"{name}.packed"), tensors.pop(f"{name}.indices")
    except (KeyError, TypeError, PatternError) as error:
        raise CheckpointError(f"{name}: damaged description of a sparse tensor ({error})") from None
    check_packed(packed, indices, bound, name)
    pattern = _labelled(pattern, label)
    tensor = StructuredSparseTensor.from_packed(packed, indices, pattern, shape)
    return tensor.t() if fields["transposed"] else tensor


def _labelled(pattern: Pattern, label: object) -> Pattern:
    """The pattern under its short name, where that name still means the same here."""
    try:
        named = Pattern.parse(label) if isinstance(label, str) else pattern
    except PatternError:
        return pattern
    return named if named == pattern else pattern


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, as hex."""
    flat = tensor.detach().cpu().contiguous().flatten()
    data = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return hashlib.sha256(data).hexdigest()


def write_atomically(path: Path, write: Any) -> None:
    """Call ``write(temporary)`` beside ``path``, then put the file in place in one step.

    Raises:
        CheckpointError: with the system's reason; nothing is left at ``path`` that was not there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {path} ({error}); free space or choose another folder"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented and with sorted keys left as given."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
