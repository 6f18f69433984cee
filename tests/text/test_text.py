"""Calibration and evaluation text: files, tables, data sets by name, and the cache of tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import s3tensor as s3
from s3tensor import cli, llm
from s3tensor.text import files, text, token_cache

ROWS = [{"id": 7, "body": "First, line\nand next."}, {"id": 8, "body": "Zweitens: Größe."}]
BODIES = [str(row["body"]) for row in ROWS]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    import pandas as pd

    return pd.DataFrame(rows).to_csv(index=False).encode()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lambda rows: "\n".join(json.dumps(row) for row in rows).encode(),
    "a.jsonl.gz": lambda rows: gzip.compress(WRITERS["a.jsonl"](rows), mtime=0),
    "lines.json.gz": lambda rows: gzip.compress(
        WRITERS["a.jsonl"](rows), mtime=0
    ),  # as C4 has them
    "a.json": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "a.csv": as_csv,
    "a.tsv": lambda rows: b"\n".join(
        b"\t".join(json.dumps(str(value), ensure_ascii=False).encode() for value in line)
        for line in [list(rows[0]), *(row.values() for row in rows)]
    ).replace(b"\\n", b"\n"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_gives_the_documents_of_its_column(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[name](ROWS))
    named = f"{path}:body"
    assert llm.load_text(named) == llm.load_text(str(path), column="body") == "\n\n".join(BODIES)
    assert files.read_texts(str(path)) == BODIES  # the only column of text
    with pytest.raises(s3.CalibrationError, match=r"no column 'title'; it has 'id', 'body'"):
        llm.load_text(f"{path}:title")
    with pytest.raises(s3.CalibrationError, match="one column and 'id' is another"):
        llm.load_text(named, column="id")
    with pytest.raises(s3.CalibrationError, match=r"'id' in row 1 is a int|'id' .* no text"):
        llm.load_text(f"{path}:id")


def test_parquet_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pandas reads .parquet with pyarrow, of the extra data")
    import pandas as pd

    path = tmp_path / "a.parquet"
    pd.DataFrame(ROWS).to_parquet(path)
    assert files.read_texts(f"{path}:body") == BODIES
    path.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(s3.CalibrationError, match="is not valid parquet"):
        files.read_texts(str(path))


def test_a_column_that_is_called_text_needs_no_name_and_two_others_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"title": "t", "text": "one"}\n{"title": "u", "text": null}\n{"title": "v"}\n')
    assert files.read_texts(str(path)) == ["one"]  # what is missing in a row is left out
    path.write_text('{"title": "t", "body": "one"}\n')
    with pytest.raises(s3.CalibrationError, match=r"2 columns of text .* a.jsonl:COLUMN"):
        files.read_texts(str(path))
    path.write_text('["not", "an", "object"]\n')
    with pytest.raises(s3.CalibrationError, match="a row is a list"):
        files.read_texts(str(path))


def test_a_folder_gives_its_texts_or_with_a_column_its_tables(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.md").write_text("prose")
    (tmp_path / "a.jsonl").write_text('{"body": "row"}')
    assert llm.load_text(str(tmp_path)) == "prose"
    assert llm.load_text(str(tmp_path), column="body") == "row"
    (tmp_path / "notes" / "b.md").unlink()
    with pytest.raises(s3.CalibrationError, match=r"no file .txt or .md; for tables name"):
        llm.load_text(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.csv", b"", "holds no text"),
        ("a.csv", b"body\n", "0 columns of text among 'body'"),
        ("a.json", b"[]", "holds no text"),
        ("a.jsonl", b'{"body": "one"}\n{"body": \n', "is not valid jsonl .line 2"),
        ("a.json", b"[1, 2]", "a row is a int"),
        ("a.csv", b'body\n"open', "is not valid csv"),
        ("a.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"body": "cut"}', mtime=0)[:-9], "cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(s3.CalibrationError, match=message) as caught:
        llm.load_text(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_column_is_refused_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("prose")
    with pytest.raises(s3.CalibrationError, match="plain text and has no column 'body'"):
        llm.load_text(str(tmp_path / "a.txt"), column="body")
    with pytest.raises(s3.CalibrationError, match="pydoc has no columns"):
        llm.load_text("pydoc", column="body")
    with pytest.raises(s3.CalibrationError, match=r"no text at .*a.txt:body"):
        llm.load_text(f"{tmp_path / 'a.txt'}:body")
    odd = tmp_path / "a.jsonl:body"  # a name that looks like one
    odd.write_text("prose")
    assert llm.load_text(str(odd)) == "prose"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5))
def test_json_lines_give_back_every_text_that_is_not_blank(documents: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        lines = [
            json.dumps({"n": n, "body": d}, ensure_ascii=n % 2 == 0)
            for n, d in enumerate(documents)
        ]
        path.write_text("\n".join(lines), encoding="utf-8", newline="")
        kept = [document for document in documents if document.strip()]
        if kept:
            assert files.read_texts(f"{path}:body") == kept
        else:
            with pytest.raises(s3.CalibrationError, match="holds no text"):
                files.read_texts(f"{path}:body")


# data sets by name --------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for C4 on the hub, read by the library datasets itself."""
    pytest.importorskip("datasets", reason="C4 and WikiText-2 are read through the extra data")
    folder = tmp_path / "c4"
    (folder / "en").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = "".join(json.dumps({"text": f"{split} {n}"}) + "\n" for n in range(9))
        (folder / "en" / f"{split}.json.gz").write_bytes(gzip.compress(rows.encode()))
    splits = text._HUB["c4"][2]
    names = {split: f"en/{split}.json.gz" for split in ("train", "validation")}
    monkeypatch.setitem(text._HUB, "c4", (str(folder), None, splits, names))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return folder


def test_c4_is_read_by_parts_and_documents(corpus: Path) -> None:
    assert llm.load_text("c4", documents=2) == "train 0\n\ntrain 1"
    assert llm.load_text("c4", "held-out").startswith("validation 0\n\n")
    assert llm.load_text("c4", "held-out").endswith("validation 8")


def test_no_network_and_no_cache_is_one_line_that_names_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="C4 and WikiText-2 are read through the extra data")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setitem(
        text._HUB, "wikitext2", (str(tmp_path / "gone"), None, {"calibration": "train"}, None)
    )
    with pytest.raises(s3.CalibrationError, match="cannot load wikitext2") as caught:
        llm.load_text("wikitext2")
    said = str(caught.value)
    assert str(tmp_path / "datasets") in said and "pydoc or a path" in said and "\n" not in said


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(s3.CalibrationError, match=r"pip install 's3tensor\[data\]'"):
        llm.load_text("c4")


# tokens on the disk -------------------------------------------------------------------------------


def words_tokenizer(extra: str = "") -> Any:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: n for n, word in enumerate(["?", "train", *"012345678"])}
    if extra:
        vocabulary[extra] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The cache in a folder of the test; how often the data set is asked for."""
    asked: list[tuple[str, str, int]] = []

    def of_hub(source: str, part: str, documents: int) -> str:
        asked.append((source, part, documents))
        return f"train {len(asked)}"

    monkeypatch.setattr(text, "_hub_text", of_hub)
    monkeypatch.setenv("S3TENSOR_CACHE", str(tmp_path / "cache"))
    return asked


def test_tokens_of_a_data_set_are_kept_by_tokenizer_source_and_settings(
    hub: list[tuple[str, str, int]], tmp_path: Path
) -> None:
    tokenizer = words_tokenizer()
    first = llm.load_tokens("c4", tokenizer)
    assert torch.equal(llm.load_tokens("c4", tokenizer), first) and len(hub) == 1
    assert first.dtype == torch.int64 and first.tolist() == [1, 3]
    for other in (
        lambda: llm.load_tokens("c4", tokenizer, "held-out"),
        lambda: llm.load_tokens("c4", tokenizer, documents=7),
        lambda: llm.load_tokens("wikitext2", tokenizer),
        lambda: llm.load_tokens("c4", words_tokenizer("more")),
    ):
        before = len(hub)
        other()
        assert len(hub) == before + 1
        other()
        assert len(hub) == before + 1
    kept = list((tmp_path / "cache" / "tokens").iterdir())
    assert len(kept) == 5 and all(path.suffix == ".safetensors" for path in kept)


def test_kept_tokens_that_are_damaged_are_made_again(
    hub: list[tuple[str, str, int]], tmp_path: Path
) -> None:
    tokenizer = words_tokenizer()
    llm.load_tokens("c4", tokenizer)
    (kept,) = (tmp_path / "cache" / "tokens").iterdir()
    for damage in (b"", kept.read_bytes()[:-1], b"\xff" * 64):
        kept.write_bytes(damage)
        assert llm.load_tokens("c4", tokenizer).tolist() == [1, len(hub) + 2]
    assert len(hub) == 4


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    hub: list[tuple[str, str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("S3TENSOR_CACHE", str(tmp_path / "file" / "below"))
    assert llm.load_tokens("c4", words_tokenizer()).tolist() == [1, 3]
    assert llm.load_tokens("c4", words_tokenizer()).tolist() == [1, 4]


def test_large_files_are_kept_by_their_text_and_small_ones_not(
    hub: list[tuple[str, str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = words_tokenizer(), tmp_path / "a.txt"
    path.write_text("train 1 2")
    assert llm.load_tokens(str(path), tokenizer).tolist() == [1, 3, 4]
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(text, "_WORTH_KEEPING", 5)
    assert llm.load_tokens(str(path), tokenizer).tolist() == [1, 3, 4]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    path.write_text("train 2 1")
    assert llm.load_tokens(str(path), tokenizer).tolist() == [1, 4, 3]
    assert token_cache.token_file("key", lambda words: words) is None  # cannot tell what it is


def test_the_command_line_takes_a_column_and_refuses_what_has_none(tmp_path: Path) -> None:
    from saved_models import saved  # a model and its tokenizer in a folder

    model = saved(tmp_path / "model")
    table = tmp_path / "a.jsonl"
    table.write_text(
        "\n".join(json.dumps({"id": n, "body": "the for statement " * 40}) for n in range(8))
    )

    def run(*arguments: Any) -> Any:
        return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])

    short = ("--samples", 2, "--seq-len", 16)
    by_colon = run("eval", model, "--text", f"{table}:body", *short, "--json")
    assert by_colon.exit_code == 0, by_colon.output
    by_option = run("eval", model, "--text", table, "--text-column", "body", *short, "--json")
    figures = [json.loads(found.stdout)["perplexity"] for found in (by_colon, by_option)]
    assert figures[0] == figures[1] > 1
    pruned = run(
        *("prune", model, "--calibration", table, "--text-column", "body", *short),
        *("--pruner", "magnitude", "--eval-samples", 1, "--out", tmp_path / "sparse"),
    )
    assert pruned.exit_code == 0, pruned.output
    refused = run("eval", model, "--text", f"{table}:title", *short)
    assert refused.exit_code == 1 and "it has 'id', 'body'" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
