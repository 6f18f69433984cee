"""A new pattern: describe it, draw it, prune to it, pack it, train with it.

    python examples/custom_pattern.py --out picture.png

*Corners*: of each 8x8 tile, rows r and r + 4 and columns c and c + 4 meet in four weights, which are kept or
pruned together. They are not a box of the weight itself; in a View that splits and permutes dims they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.utils import parametrize

import s3tensor as s3
from s3tensor import draw as viz
from s3tensor.pattern import preset
from s3tensor.testing import assert_contract


# An 8x8 tile has 16 such blocks, one for each (r, c); all 16 compete, and half of them are kept.
@preset("corners@D", r"corners@([0-9.]+)", "four corners in each 8x8 tile, at density D")
def corners(density: str) -> s3.Pattern:
    return s3.Pattern(
        view="(m a r) (k b c) -> m k r c a b",
        sizes={"a": 2, "r": 4, "b": 2, "c": 4},
        block=(1, 1, 1, 1, 2, 2),
        scope=(1, 1, 4, 4, 1, 1),
        keep=float(density),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write a picture of the pattern")
    args = parser.parse_args()
    torch.manual_seed(0)

    name = "corners@0.5"
    assert_contract(name, (32, 64))  # the laws that every pattern keeps
    print(viz.describe(name, (32, 64)))

    weight = torch.randn(32, 64)
    inputs = torch.randn(512, 64) @ torch.randn(64, 64)
    hessian = s3.compute_hessian(inputs)
    for pruner in ("magnitude", "sparsegpt", "admm"):
        pruned = s3.prune.get(pruner)(weight, hessian, name)
        assert s3.satisfies(pruned.weight, name)
        print(f"{pruner:10} output error {s3.output_error(pruned.weight, weight, hessian):.4f}")
    print(s3.StructuredSparseTensor.from_dense(pruned.weight, name, pruned.mask))

    layer = torch.nn.Linear(64, 32)
    parametrize.register_parametrization(layer, "weight", s3.S3Sparse(name, mode="ste"))
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(100):
        loss = (layer(inputs) - inputs @ weight.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 33 == 0:
            print(f"training, step {step:3}: loss {float(loss.detach()):.2f}")
    s3.finalize(layer)
    assert s3.satisfies(layer.weight.to_dense(), name)

    if args.out:
        tile = torch.randn(16, 16)
        viz.draw_layout(name, (16, 16), s3.project(tile, name)).savefig(args.out)
        print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
