"""A language model of toy size in a folder, with a tokenizer that reads any text."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import s3tensor as s3
from s3tensor import llm

END = "<|endoftext|>"


def byte_level(
    pieces: int, text: str | None = None, **special: str
) -> transformers.PreTrainedTokenizerFast:
    """Bytes and merges, ``pieces`` in all, learned from ``text`` or from some of pydoc.

    Args:
        special: tokens by role, such as ``eos_token="</s>"``; they come first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, initial_alphabet=alphabet, show_progress=False,
        special_tokens=sorted(set(special.values())),
    )  # fmt: skip
    tokenizer.train_from_iterator([text or llm.load_text("pydoc")[:20_000]], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def saved(folder: Path, positions: int = 64, seed: int = 0) -> Path:
    """A random Llama, dense, and a byte-level tokenizer of 320 pieces; returns the folder."""
    fast = byte_level(320, eos_token=END, bos_token=END)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=len(fast), max_position_embeddings=positions,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    s3.save_pretrained(network, folder, fast, dense=True)
    return folder
