"""Train a small language model on text, prune it in several ways, compare and save.

    python examples/llm_pruning.py                       # about a minute on a CPU, nothing is downloaded
    python examples/llm_pruning.py --pattern rowpair16 --out pruned

The model is a Llama of 0.2 M parameters over bytes, the text is Python's own documentation.
``examples/demo.py`` does the same to a real model, SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import s3tensor as s3


def bytes_of(part: str) -> torch.Tensor:
    """Text of one part of the source, as one sequence of bytes."""
    text = s3.llm.load_text("pydoc", part) if part else s3.llm.load_text("pydoc")
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def trained(text: torch.Tensor, steps: int, seq_len: int) -> LlamaForCausalLM:
    """A small Llama after some steps of AdamW."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=seq_len,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = torch.randint(len(text) - seq_len, (8,))
        batch = torch.stack([text[start : start + seq_len] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"  step {step:4}: loss {float(loss.detach()):.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=400, help="of training the dense model")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--out", type=Path, help="save the best one")
    args = parser.parse_args()
    torch.manual_seed(0)

    text, held_out = bytes_of(""), bytes_of("held-out")[: 32 * args.seq_len]
    print(f"training on {len(text):,} bytes")
    dense = trained(text, args.steps, args.seq_len)
    batches = list(text[: 32 * args.seq_len].view(-1, 4, args.seq_len))
    perplexity = s3.perplexity(dense, held_out, seq_len=args.seq_len)
    print(f"dense: perplexity {perplexity:.2f} a byte, on text that it has not seen")

    found = {}
    for pruner in ("magnitude", "wanda", "sparsegpt", "admm"):
        start = time.perf_counter()
        model = copy.deepcopy(dense)
        report = s3.llm.prune_model(model, batches, args.pattern, pruner, progress=False)
        perplexity = s3.perplexity(model, held_out, seq_len=args.seq_len)
        found[perplexity] = pruner, model
        seconds = time.perf_counter() - start
        print(
            f"{pruner:10} perplexity {perplexity:6.2f}, {len(report.linears)} linears, {seconds:4.1f} s",
            flush=True,
        )
    pruner, model = found[min(found)]
    prompt = torch.tensor([list(b"The function returns ")])
    words = model.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    print(f"the best, {pruner}, says: {bytes(words[0].tolist()).decode(errors='replace')!r}")
    if args.out:
        s3.save_pretrained(model, args.out, card={"pruner": pruner})
        print(f"saved in {args.out}: {len(s3.verify(args.out))} weights verified")


if __name__ == "__main__":
    main()
