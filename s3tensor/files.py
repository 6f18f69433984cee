"""Files: atomic writes, the lock of a run's folder, and the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from s3tensor.errors import CheckpointError

TEMPORARY = ".tmp"  # end of the name of a file that is being written
LOCK = "run.lock"

_LOCKED: set[Path] = set()  # folders that this process holds


def write_atomically(path: Path, write: Callable[[str], object]) -> None:
    """Call ``write(temporary)`` for a file beside ``path``, then rename it to ``path`` in one step.

    Raises:
        CheckpointError: with the system's reason; an older file at ``path`` is unchanged.
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
                os.unlink(temporary)  # after an error; a success has renamed it


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
    text = json_text(value)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def lock_file(handle: int) -> None:
    """Lock an open file, until it is closed or the process ends, or raise OSError at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
    else:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def json_text(value: Any) -> str:
    """JSON as it is written to a file: indented, its keys in the order given."""
    return json.dumps(value, indent=2) + "\n"


def write_output(path: Path, text: str) -> None:
    """Write text to a path that a user chose, as a shell's ``>`` would, but atomically for a file.

    The target of a symbolic link is written and the link stays. A device or a pipe, such as
    ``/dev/stdout``, is written to and never replaced. The files of a model's folder are not written so:
    there a link, such as one into the Hugging Face cache, is replaced and its target left alone.

    Raises:
        CheckpointError: when it cannot be written, with the system's reason.
    """
    if not is_special(path):
        target = Path(os.path.realpath(path))
        write_atomically(target, lambda temporary: Path(temporary).write_text(text, "utf-8"))
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({first_line(error)})") from error


def is_special(path: Path) -> bool:
    """Whether a path exists and is neither a file nor a folder: a device, a pipe, or a link to one."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder for one run: a second process is refused. Within one process it may be nested.

    The lock is released when the process ends, however it ends.

    Raises:
        CheckpointError: another process holds the folder, or it cannot be written.
    """
    path = Path(folder).resolve()
    if path in _LOCKED:
        yield
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / LOCK).open("a+b")
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {folder} ({error}); choose another folder"
        ) from None
    with file:
        try:
            lock_file(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK)):
                raise OSError  # the run that held it has just ended and removed the file
        except OSError:
            raise CheckpointError(
                f"another run is at work in {folder}; wait for it, or choose another folder"
            ) from None
        _LOCKED.add(path)
        try:
            yield
        finally:
            _LOCKED.remove(path)
            with contextlib.suppress(OSError):
                (path / LOCK).unlink()


def cache_folder() -> Path:
    """The folder of a user's tables: ``S3TENSOR_CACHE``, or ``s3tensor`` in the system's cache folder."""
    named = os.environ.get("S3TENSOR_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s3tensor"
