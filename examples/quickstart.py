"""Prune a layer, compress it, run it, save it and load it.

    python examples/quickstart.py

Takes seconds on a CPU, and downloads nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import s3tensor as s3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="2:4", help="see: s3tensor show --help")
    parser.add_argument("--features", type=int, default=512)
    args = parser.parse_args()
    torch.manual_seed(0)

    # A layer, and inputs whose features are correlated, as those of a real model are.
    layer = torch.nn.Linear(args.features, args.features)
    weight = layer.weight.detach().clone()
    inputs = torch.randn(4096, args.features) @ torch.randn(args.features, args.features).div(16)
    hessian = s3.compute_hessian(inputs)

    print(f"{args.pattern} on {args.features}x{args.features}")
    results = {}
    for name in ("magnitude", "wanda", "sparsegpt", "admm"):
        results[name] = s3.prune.get(name)(weight, hessian, args.pattern)
        error = s3.output_error(results[name].weight, weight, hessian)
        print(f"  {name:10} output error {error:.4f}")

    pruned = results["admm"]
    layer.weight = torch.nn.Parameter(
        s3.StructuredSparseTensor.from_dense(pruned.weight, args.pattern, pruned.mask),
        requires_grad=False,
    )
    print(layer.weight)

    with torch.no_grad():
        y = layer(inputs[:8])
        expected = torch.nn.functional.linear(inputs[:8], pruned.weight, layer.bias)
    torch.testing.assert_close(y, expected)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.pt"
        torch.save(layer.state_dict(), path)
        state = torch.load(path, weights_only=True)
        print(f"saved: {path.stat().st_size:,} bytes, {weight.nbytes:,} dense")
        again = torch.nn.Linear(args.features, args.features)
        again.load_state_dict(state, assign=True)
        with torch.no_grad():
            same = torch.equal(again(inputs[:8]), y)
    print(f"loaded again: outputs {'equal bit for bit' if same else 'DIFFER'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
