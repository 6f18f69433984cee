"""Calibration and evaluation text, and its tokens."""

from __future__ import annotations

import contextlib
import zlib
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from s3tensor.errors import CalibrationError
from s3tensor.modes import neutral
from s3tensor.text.files import read_texts
from s3tensor.text.token_cache import cached

# Parts of the Python documentation topics, by a checksum of the topic's name modulo 10, so that a new
# topic in Python does not move the others.
_PYDOC_PARTS = {"calibration": range(7), "development": range(7, 8), "held-out": range(8, 10)}
_WORTH_KEEPING = 2**20  # characters; fewer are tokenized in about a second
_HUB = {  # name: (repository, configuration, splits by part, column)
    "c4": (
        "allenai/c4",
        None,
        {"calibration": "train", "development": "validation", "held-out": "validation"},
        {
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "development": "validation", "held-out": "test"},
        None,
    ),
}


def has_parts(source: str) -> bool:
    """Whether a source has separate calibration and held-out text; a path does not."""
    return source == "pydoc" or source in _HUB


def load_text(
    source: str,
    part: str = "calibration",
    documents: int = 4096,
    column: str | None = None,
) -> str:
    """Text of one part of a source.

    Args:
        source: ``pydoc`` (the standard library's documentation topics, offline), ``c4`` or ``wikitext2``
            (through ``datasets``, online or from its cache), or a path: a text file, a table
            (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``), or a folder of ``.txt`` and ``.md``
            files. ``FILE:COLUMN`` names the column of a table. A path has no parts: all of it is used.
        part: ``calibration``, ``development`` or ``held-out``; of pydoc, disjoint sets of topics,
            without paragraphs of an earlier part.
        documents: at most this many documents of ``c4``.
        column: of a table or of a folder of tables; default ``text``, or the only one with text.

    Raises:
        CalibrationError: an unknown source, part or column, or a source without text.
    """
    _check(source, part, column)
    if source == "pydoc":
        return "\n\n".join(pydoc_topics(part).values())
    if source in _HUB:
        return _hub_text(source, part, documents)
    return "\n\n".join(read_texts(source, column))


def load_tokens(
    source: str,
    tokenizer: Any,
    part: str = "calibration",
    documents: int = 4096,
    column: str | None = None,
) -> Tensor:  # (tokens,) int64
    """Tokens of :func:`load_text`, cached on disk.

    The cache's key is the tokenizer, the source and these settings: cached C4 and WikiText-2 need neither
    a network nor ``datasets``. The folder is ``tokens`` under ``S3TENSOR_CACHE``, or under ``s3tensor`` in
    the system's cache folder, and can be deleted at any time. Texts of less than a million characters are
    tokenized each time.

    Raises:
        CalibrationError: as :func:`load_text`.
    """
    _check(source, part, column)
    if source in _HUB:
        # By name: with cached tokens the data set is not loaded.
        key = repr((_HUB[source], part, documents))
        return cached(
            key, tokenizer, lambda: tokenize(_hub_text(source, part, documents), tokenizer)
        )
    text = load_text(source, part, documents, column)
    if len(text) < _WORTH_KEEPING:
        return tokenize(text, tokenizer)
    return cached(text, tokenizer, lambda: tokenize(text, tokenizer))


def pydoc_topics(part: str) -> dict[str, str]:
    """The standard library's documentation topics of one part, by name, in order.

    Topics share whole sections. Later parts (in the order calibration, development, held-out) leave out the
    paragraphs of earlier ones, so that no model is evaluated on what it was pruned on.
    """
    from pydoc_data.topics import topics

    known = ""
    for name, keys in _PYDOC_PARTS.items():
        found = {t: topics[t] for t in sorted(topics) if zlib.crc32(t.encode()) % 10 in keys}
        fresh = {topic: _without(text, known) for topic, text in found.items()}
        if name == part:
            return {topic: text for topic, text in fresh.items() if text}
        known += " ".join(_one_line(text) for text in fresh.values()) + " "
    raise KeyError(part)


def _without(text: str, known: str) -> str:
    """The paragraphs of a text that another does not contain, whatever their line breaks."""
    return "\n\n".join(p for p in text.split("\n\n") if _one_line(p) not in known)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _check(source: str, part: str, column: str | None) -> None:
    if part not in _PYDOC_PARTS:
        raise CalibrationError(f"unknown part {part!r}; use one of {', '.join(_PYDOC_PARTS)}")
    if column is not None and has_parts(source):
        raise CalibrationError(
            f"{source} has no columns to choose; leave out the column {column!r}"
        )


def _hub_text(source: str, part: str, documents: int) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{source} needs the package datasets: pip install 's3tensor[data]'; offline, use pydoc or a path"
        ) from None
    repository, configuration, splits, files = _HUB[source]
    split = splits[part]
    try:
        data = load_dataset(
            repository,
            configuration,
            split=split,
            data_files={split: files[split]} if files else None,
        )
    except Exception as error:  # many types, all for want of data
        from datasets.config import HF_DATASETS_CACHE

        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"cannot load {source} ({first_line}); it is neither in the cache {HF_DATASETS_CACHE} nor "
            "on the network: use pydoc or a path to text, or load it once on a machine with a network"
        ) from error
    text = "\n\n".join(
        data[: min(documents, len(data))]["text"] if source == "c4" else data["text"]
    )
    if not text.strip():
        raise CalibrationError(f"{source} holds no text in its split {split}")
    return text


@neutral()
def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a text, (tokens,) int64, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(ids["input_ids"], dtype=torch.int64)


@neutral()
def windows(tokens: Tensor, samples: int, seq_len: int, seed: int = 0) -> Tensor:
    """``samples`` non-overlapping windows of ``seq_len`` tokens, (samples, seq_len), in a seeded order.

    Raises:
        CalibrationError: a text that is too short, with both numbers.
    """
    if samples < 1 or seq_len < 2:
        raise CalibrationError(f"samples={samples} must be >= 1 and seq_len={seq_len} >= 2")
    available = tokens.numel() // seq_len
    if available < samples:
        raise CalibrationError(
            f"the text has {tokens.numel()} tokens, {samples} x {seq_len} = {samples * seq_len} are needed; "
            f"give more text, at most {available} samples, or shorter sequences"
        )
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return tokens[: available * seq_len].reshape(available, seq_len)[order]


def check_tokens(model: nn.Module, token_ids: Tensor, length: int) -> None:
    """Refuse token ids beyond a model's vocabulary, and sequences longer than its positions.

    Raises:
        CalibrationError: with the limit and what was given.
    """
    try:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of models with several, such as CLIP
        embedding = None
    rows = getattr(getattr(embedding, "weight", None), "shape", (None,))[0]
    least, largest = int(token_ids.min()), int(token_ids.max())
    if rows is not None and not 0 <= least <= largest < rows:
        raise CalibrationError(
            f"token ids from {least} to {largest} for a vocabulary of {rows}; use the model's own "
            "tokenizer"
        )
    config: Any = getattr(model, "config", None)
    with contextlib.suppress(
        AttributeError, ValueError
    ):  # of a model of text and images, that of text
        config = config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:  # XLNet says -1: without a limit
        raise CalibrationError(
            f"sequences of {length} tokens for a model of {positions} positions; give a seq_len of at "
            f"most {positions}"
        )


def calibration_tokens(
    source: str,
    tokenizer: Any,
    samples: int,
    seq_len: int,
    seed: int = 0,
    batch: int = 1,
    column: str | None = None,
) -> list[Tensor]:
    """Calibration batches, each (batch, seq_len) int64, from a source that :func:`load_text` knows."""
    tokens = load_tokens(source, tokenizer, column=column)
    picked = windows(tokens, samples, seq_len, seed)
    return list(picked.split(batch))


@overload
def get_c4(
    num_samples: int,
    seq_len: int,
    tokenizer: Any,
    seed: int = 42,
    split: str = "train",
    pairs: Literal[False] = False,
) -> list[Tensor]: ...
@overload
def get_c4(
    num_samples: int,
    seq_len: int,
    tokenizer: Any,
    seed: int = 42,
    split: str = "train",
    *,
    pairs: Literal[True],
) -> list[tuple[Tensor, Tensor]]: ...
def get_c4(
    num_samples: int,
    seq_len: int,
    tokenizer: Any,
    seed: int = 42,
    split: str = "train",
    pairs: bool = False,
) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
    """``num_samples`` sequences of C4, each (1, seq_len) int64: calibration for ``prune_model``.

    ``split`` is ``train`` or ``validation``. With ``pairs`` each sequence comes with its target, which is
    -100 (ignored by a cross entropy) at all tokens but the last. Needs ``datasets``, and a network or a
    filled cache.

    Raises:
        CalibrationError: an unknown split, no data, or too little of it.
    """
    parts = {"train": "calibration", "validation": "held-out"}
    if split not in parts:
        raise CalibrationError(f"unknown split {split!r} of C4; use train or validation")
    tokens = load_tokens("c4", tokenizer, parts[split])
    picked = list(windows(tokens, num_samples, seq_len, seed).split(1))
    if not pairs:
        return picked
    last = torch.arange(seq_len) == seq_len - 1
    return [(sequence, sequence.masked_fill(~last, -100)) for sequence in picked]
