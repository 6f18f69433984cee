"""Compressed safetensors: a state dict with structured-sparse tensors in one flat, checked file.

A sparse tensor ``name`` becomes the plain tensors ``name.packed`` and ``name.indices``, and with int8 values
``name.scales``. Its pattern (spelled out in parts), shape and orientation, and a SHA-256 of every stored
tensor, are JSON in the file's metadata, after a SHA-256 of that JSON. No pickle is read or written, and every
size is checked before memory is allocated.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from s3tensor.errors import CheckpointError
from s3tensor.files import first_line, write_atomically
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.int8 import class_of

FORMAT = 1
METADATA_KEY = "s3tensor"


def flatten_state(
    state: Mapping[str, Tensor],
    device: torch.device | str | None = None,
    checksums: bool = False,
) -> tuple[dict[str, Tensor], str]:
    """A state dict as plain contiguous tensors and one string that describes its sparse ones.

    For stores that know plain tensors only: ``torch.distributed.checkpoint``, safetensors, another
    framework. :func:`unflatten_state` is the inverse.

    Args:
        device: where the tensors go; ``None`` leaves them, and contiguous ones share their memory.
        checksums: put a SHA-256 of every tensor in the string.

    Returns:
        tensors by name, a sparse ``name`` as ``name.packed`` and ``name.indices`` in canonical order, with
        int8 values ``name.scales`` too, and the description: a SHA-256, a space and JSON.

    Raises:
        CheckpointError: a name is also that of a part of a sparse tensor.
    """
    tensors: dict[str, Tensor] = {}
    sparse: dict[str, dict[str, Any]] = {}
    for name, tensor in state.items():
        parts = {name: tensor}
        if isinstance(tensor, Compressed):
            parts = {f"{name}.{p}": t for p, t in zip(tensor.PARTS, tensor.parts(), strict=True)}
            sparse[name] = tensor.description()
        for key, part in parts.items():
            if key in tensors:
                raise CheckpointError(f"two tensors would be stored as {key!r}; rename one of them")
            part = part.detach() if device is None else part.detach().to(device)
            tensors[key] = part.contiguous()
    document: dict[str, Any] = {"format": FORMAT, "sparse": sparse}
    if checksums:
        document["sha256"] = {name: checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps(document)
    return tensors, f"{_digest(text)} {text}"


def unflatten_state(
    tensors: Mapping[str, Tensor],
    description: str,
    device: torch.device | str | None = None,
    where: str | Path = "the state",
) -> dict[str, Tensor]:
    """The state dict that :func:`flatten_state` took apart; indices, and checksums if any, are verified.

    Args:
        device: where the tensors go; ``None`` leaves them, and they share their memory.
        where: the name of the state in errors, such as its path.

    Raises:
        CheckpointError: a description that is damaged, of another format or of other tensors, a checksum
            that fails, or parts that no sparse tensor has.
    """
    document = _document(description, where)
    sums = document.get("sha256")
    if sums is not None:
        odd = sorted(tensors.keys() ^ sums.keys())
        if odd:
            raise CheckpointError(f"{where}: tensor {odd[0]!r} is missing, or not in the checksums")
        for name, tensor in tensors.items():
            if checksum(tensor) != sums[name]:
                raise CheckpointError(
                    f"{where}: the checksum of {name!r} fails; the file was altered"
                )
    rest = dict(tensors)
    state: dict[str, Tensor] = {}
    for name, fields in document["sparse"].items():
        kind: Any = class_of(fields)
        names = [f"{name}.{part}" for part in kind.PARTS]
        parts = [rest.pop(part) for part in names if part in rest]
        if len(parts) < len(names):
            raise CheckpointError(
                f"{where}: {name}: damaged description of a sparse tensor; a part of it is missing"
            )
        state[name] = kind.from_stored(*parts, fields, f"{where}: {name}")
    for name, tensor in rest.items():
        if name in state:
            raise CheckpointError(f"{where}: {name!r} is there twice, dense and sparse")
        state[name] = tensor
    return state if device is None else {name: part.to(device) for name, part in state.items()}


def without_shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where they share storage, which safetensors refuses."""
    stored: set[int] = set()  # addresses
    made = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if address in stored else tensor
        stored.add(address)
    return made


def save_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state dict to ``path`` atomically: the whole file or none.

    The same state gives the same bytes. Tensors that share storage are stored once for each name: drop tied
    names first.

    Raises:
        CheckpointError: the file cannot be written, with the system's reason, or a name is also that of a
            part of a sparse tensor.
    """
    tensors, description = flatten_state(state, "cpu", checksums=True)
    tensors = without_shared_storage(tensors)
    metadata = {METADATA_KEY: description}
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write one safetensors file; the same tensors and metadata give the same bytes."""
    save_file(dict(tensors), path, dict(metadata))
    _order_metadata(path)


def _order_metadata(path: str | Path) -> None:
    """Sort the entries of a file's metadata: safetensors writes them in an order that varies."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the same entries in the same spelling; spaces may follow
            file.seek(8)
            file.write(text.ljust(size))


def load_state(
    path: Path | Sequence[Path], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Read what :func:`save_state` wrote, or the files of one model; every checksum and index is verified.

    Raises:
        CheckpointError: a file that is missing, truncated, altered, or not of this format, or files that
            are not of one model.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    where = paths[0] if len(paths) == 1 else paths[0].parent
    tensors: dict[str, Tensor] = {}
    descriptions = set()
    for each in paths:
        with open_weights(each) as (file, description):
            if description is None:
                raise CheckpointError(
                    f"{each} is not an s3tensor file: its metadata lacks {METADATA_KEY!r}"
                )
            descriptions.add(description)
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in tensors:
                    raise CheckpointError(f"{each}: {name!r} is in two files")
                tensors[name] = file.get_tensor(name)
    description = descriptions.pop()
    if descriptions:
        raise CheckpointError(f"{where}: its {len(paths)} files are not of one compressed model")
    if "sha256" not in _document(description, where):
        raise CheckpointError(f"{where}: metadata lacks 'sha256'")
    return unflatten_state(tensors, description, device, where)


@contextlib.contextmanager
def open_weights(path: str | Path) -> Iterator[tuple[Any, str | None]]:
    """A safetensors file, open, and the description in its metadata: None in one without sparse weights.

    Raises:
        CheckpointError: a file that is missing, truncated or altered, here or while it is read.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file, (file.metadata() or {}).get(METADATA_KEY)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        # The last three: a type name that safetensors knows and this version of torch does not.
        raise CheckpointError(
            f"{path} is truncated or altered ({first_line(error)}); get it again"
        ) from error


def read_description(description: object, where: str | Path) -> dict[str, Any]:
    """The descriptions of sparse tensors, by name, in a string of :func:`flatten_state`; not yet trusted.

    Raises:
        CheckpointError: a string that is damaged, or of another format.
    """
    return _document(description, where)["sparse"]


def _document(description: object, where: str | Path) -> dict[str, Any]:
    if not isinstance(description, str):
        raise CheckpointError(
            f"{where}: its description is a {type(description).__name__}, not the string of flatten_state"
        )
    digest, _, text = description.partition(" ")
    if digest != _digest(text):
        raise CheckpointError(f"{where}: the checksum of its metadata fails; the file was altered")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: damaged metadata ({error})") from None
    known = document.get("format") if isinstance(document, dict) else None
    if type(known) is not int or known != FORMAT:
        raise CheckpointError(
            f"{where} has format {known!r:.40}, this version of s3tensor reads {FORMAT}; update s3tensor"
        )
    if not isinstance(document.get("sparse"), dict):
        raise CheckpointError(f"{where}: metadata lacks 'sparse'")
    if not isinstance(document.get("sha256", {}), dict):
        raise CheckpointError(f"{where}: metadata has damaged 'sha256'")
    return document


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes in row-major order, as hex."""
    flat = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
