"""Text from local files: plain text, and the text column of a table."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from s3tensor.errors import CalibrationError

Columns = dict[str, list[Any]]  # a table: the values of each column

PLAIN = (".txt", ".md")  # read from a folder; a single file may have any name
_GIVE = "give pydoc, c4, wikitext2, a file, FILE:COLUMN of a table, or a folder"


def split_column(source: str) -> tuple[Path, str | None]:
    """``data.jsonl:body`` as path and column; a path may itself contain a colon."""
    path = Path(source)
    front, colon, column = source.rpartition(":")
    if colon and front and column and not path.exists() and _suffix(Path(front)) in _READERS:
        return Path(front), column
    return path, None


def read_texts(source: str, column: str | None = None) -> list[str]:
    """The documents of a local source that are not blank.

    Args:
        source: a text file of any name, one document; a table (``.jsonl``, ``.json``, ``.csv``, ``.tsv``,
            ``.parquet``; all but the last also as ``.gz``), one document per row; or a folder, whose
            ``.txt`` and ``.md`` files are read, or with a column its tables.
        column: of a table; also written ``FILE:COLUMN``. Default ``text``, or the only one with text.

    Raises:
        CalibrationError: a source that is missing, unreadable or without text, or a missing column.
    """
    path, named = split_column(source)
    if named is not None and column is not None and named != column:
        raise CalibrationError(f"{source!r} names one column and {column!r} is another; give one")
    column = column if named is None else named
    if path.is_dir():
        tables = column is not None
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and (_suffix(file) in _READERS if tables else file.suffix.lower() in PLAIN)
        )
        if not files:
            wanted = ", ".join(_READERS) if tables else " or ".join(PLAIN)
            hint = "" if tables else "; for tables name their column"
            raise CalibrationError(f"{str(path)!r} holds no text: no file {wanted}{hint}")
    elif path.is_file():
        files = [path]
    else:
        raise CalibrationError(f"no text at {str(path)!r}; {_GIVE}")
    texts = [text for file in files for text in _documents(file, column) if text.strip()]
    if not texts:
        raise CalibrationError(f"{str(path)!r} holds no text; {_GIVE}")
    return texts


def _suffix(path: Path) -> str:
    """``.jsonl`` of ``a.jsonl`` and of ``a.jsonl.gz``."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def _documents(file: Path, column: str | None) -> list[str]:
    reader = _READERS.get(_suffix(file))
    try:
        if reader is None:
            if column is not None:
                raise CalibrationError(
                    f"{str(file)!r} is read as plain text and has no column {column!r}; tables end in "
                    f"{', '.join(_READERS)}"
                )
            return [_opened(file)]
        if file.stat().st_size == 0:
            return []
        table = reader(file)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{str(file)!r} is not UTF-8 text ({error.reason} at {error.start})"
        ) from None
    except ImportError as error:
        raise CalibrationError(
            f"{str(file)!r} needs pandas, and for .parquet pyarrow ({str(error).splitlines()[0]:.80}); "
            "pip install 's3tensor[hf,data]'"
        ) from None
    except CalibrationError:
        raise
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CalibrationError(f"{str(file)!r} cannot be read ({reason})") from None
    except ValueError as error:  # of json, pandas and pyarrow: another format
        raise CalibrationError(
            f"{str(file)!r} is not valid {_suffix(file)[1:]} ({' '.join(str(error).split()):.120})"
        ) from None
    return _texts_of(table, column, file) if table else []


def _texts_of(table: Columns, column: str | None, file: Path) -> list[str]:
    there = ", ".join(map(repr, table))
    if column is None:
        holding = [name for name, values in table.items() if _holds_text(values)]
        if "text" in holding:
            column = "text"
        elif len(holding) == 1:
            column = holding[0]
        else:
            raise CalibrationError(
                f"{str(file)!r} has {len(holding)} columns of text among {there}; name one: "
                f"{file.name}:COLUMN"
            )
    if column not in table:
        raise CalibrationError(f"{str(file)!r} has no column {column!r}; it has {there}")
    texts = []
    for row, value in enumerate(table[column], start=1):
        if isinstance(value, str):
            texts.append(value)
        elif not _missing(value):
            raise CalibrationError(
                f"{str(file)!r}: {column!r} in row {row} is a {type(value).__name__}, not text; "
                f"the columns are {there}"
            )
    return texts


def _holds_text(values: Iterable[Any]) -> bool:
    present = [value for value in values if not _missing(value)]
    return bool(present) and all(isinstance(value, str) for value in present)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _opened(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix.lower() == ".gz":
        data = gzip.decompress(data)
    return data.decode("utf-8-sig")


def _json_lines(file: Path) -> Columns:
    rows = []
    for number, line in enumerate(_opened(file).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    return _by_column(rows)


def _json(file: Path) -> Columns:
    text = _opened(file)
    try:
        document = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():  # JSON lines under this name
            return _json_lines(file)
        raise error from None
    return _by_column(document if isinstance(document, list) else [document])


def _by_column(rows: list[Any]) -> Columns:
    """Rows as columns: objects by key, strings as the column ``text``."""
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    odd = next((row for row in rows if not isinstance(row, dict)), None)
    if odd is not None:
        raise ValueError(f"a row is a {type(odd).__name__}; rows are objects or strings")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _separated(separator: str) -> Callable[[Path], Columns]:
    def read(file: Path) -> Columns:
        import pandas as pd

        # Empty fields are empty text; a column of numbers is not text.
        frame = pd.read_csv(
            io.StringIO(_opened(file)), sep=separator, keep_default_na=False, low_memory=False
        )
        return {str(name): frame[name].tolist() for name in frame.columns}

    return read


def _parquet(file: Path) -> Columns:
    import pandas as pd

    frame = pd.read_parquet(file)
    return {str(name): frame[name].tolist() for name in frame.columns}


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
