"""A compressed model under torch.compile: one operator for each weight, the same answers, dynamic batches.

    python examples/compiled_inference.py             # a CPU: what the graph holds
    python examples/compiled_inference.py --device cuda --hidden 4096 --layers 8    # times, too

On a CPU a compressed weight saves memory, not time; on a GPU measured times choose its kernels.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch
from torch import nn

import s3tensor as s3


class Block(nn.Module):
    """A gated MLP with a residual, as in a decoder."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.gate = nn.Linear(hidden, 2 * hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pattern", default="2:4")
    args = parser.parse_args()
    on_gpu = torch.device(args.device).type == "cuda"
    torch.manual_seed(0)

    model = nn.Sequential(*(Block(args.hidden) for _ in range(args.layers)))
    model = model.to(args.device, torch.bfloat16 if on_gpu else torch.float32).eval()
    dense_bytes = sum(p.nbytes for p in model.parameters())
    print(s3.sparsify_(model, args.pattern))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    held = sum(getattr(p, "nbytes_compressed", p.nbytes) for p in model.parameters())
    print(f"weights: {held:,} bytes, {dense_bytes:,} dense")

    # What a graph holds: one s3tensor.linear_inference for each weight, and no dense weight.
    seen: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    from torch._dynamo.backends.common import aot_autograd

    x = torch.randn(4, args.hidden, device=args.device, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=backend))(x)
    count = seen["s3tensor.linear_inference.default"]
    print(
        f"the graph: {count} products by compressed weights, {sum(seen.values()) - count} other nodes"
    )
    assert count == 3 * args.layers and not any("unpack" in name for name in seen)

    # With Inductor, for any batch, compiled once.
    torch._dynamo.reset()
    options = s3.inductor_options() if on_gpu else None
    compiled = torch.compile(model, fullgraph=True, dynamic=not on_gpu, options=options)
    with torch.no_grad():
        for batch in (4, 7, 32):
            x = torch.randn(batch, args.hidden, device=args.device, dtype=x.dtype)
            tolerance = {"atol": 0.05, "rtol": 0.05} if on_gpu else {}
            torch.testing.assert_close(compiled(x), model(x), **tolerance)
            print(
                f"batch {batch:2}: eager {timed(model, x):8.1f} us, compiled {timed(compiled, x):8.1f} us"
            )


def timed(model: nn.Module, x: torch.Tensor, repeats: int = 20) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(repeats):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e6


if __name__ == "__main__":
    main()
