"""How far masks are from the best: a search over the masks of a few rows, every swap scored exactly.

    python bench/room.py --synthetic --pattern rowpair16    # 2560 x 9728, 32,768 samples; wants a GPU
    python bench/room.py --layer 29.down --groups 4         # a real layer of SmolLM2-135M

For a few groups of rows (a row, or the rows that a pattern couples) it starts from the masks of several
methods and from masks drawn at random, with exact weights for each. It swaps a kept and a pruned block of a
scope, the best pair of all first, until none helps (``descent``), and then goes on with tabu search (Glover
1989): always the best swap of those whose scope has not changed lately, also where the error rises. No error
is estimated: all weights of the rows are free after every swap.

That is affordable because one matrix per row gives the exact gain of every swap. Sweep (Goodnight 1979) the
matrix ``[[inv(H), w], [w', 0]]`` on the pruned weights P of the row: its last entry is then
``-w_P inv(inv(H)_PP) w_P'``, minus the loss, and turning the weights F around, whether they are kept or
pruned, changes it by ``-t_F inv(T_FF) t_F'`` with t its last column. The swap is an update of rank |F|. All
of it is in float64. The loss is that of the damped Hessian, as ADMM's is; the errors printed are undamped.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structured_obs as table
import torch
from measure import device_name, rows_before, start, versions, write_json
from torch import Tensor

import s3tensor as s3
from s3tensor.mask.projection import select, tile
from s3tensor.pattern import Pattern


@dataclass(frozen=True)
class Row:
    """Relative output errors of the searched rows, from one start."""

    pattern: str
    start: str
    as_given: float | None  # with the method's own weights; None where it gives a mask only
    refitted: float  # with the exact weights for its mask
    descent: float  # when no swap helps any more
    search: float  # the best that tabu search found after it
    swaps: int  # of descent, all groups together
    moved: float  # share of scopes in which the best mask differs from the start
    drift: float  # largest relative difference of the loss as updated and as recomputed
    seconds: float


class Group:
    """Rows that only compete among themselves: their swept matrices, and a mask that moves by swaps."""

    def __init__(
        self,
        weight: Tensor,  # (R, K) float64: the rows
        inverse: Tensor,  # (K, K) float64: of the damped Hessian
        elements: Tensor,  # (scopes, blocks, size): the places of each block in the flattened rows
        kept: Tensor,  # (scopes, blocks) bool, the same count in each scope
    ) -> None:
        rows, columns = weight.shape
        self.weight, self.inverse, self.elements = weight, inverse, elements
        self.row, self.column = elements // columns, elements % columns
        self.swept = inverse.new_empty(rows, columns + 1, columns + 1)
        self.place(kept)

    def place(self, kept: Tensor) -> None:
        """Take a mask, and sweep again."""
        self.kept = kept.clone()
        rows, columns = self.weight.shape
        mask = self.mask()
        for r in range(rows):
            matrix = self.swept[r]
            matrix[:columns, :columns] = self.inverse
            matrix[:columns, columns] = matrix[columns, :columns] = self.weight[r]
            matrix[columns, columns] = 0.0
            sweep(matrix, (~mask[r]).nonzero().squeeze(1))

    def mask(self) -> Tensor:
        """(R, K) bool."""
        flat = self.weight.new_zeros(self.weight.numel(), dtype=torch.bool)
        flat[self.elements[self.kept].flatten()] = True
        return flat.view_as(self.weight)

    def loss(self) -> float:
        """Of the damped Hessian, with exact weights."""
        return float(-self.swept[:, -1, -1].sum())

    def swaps(self) -> tuple[Tensor, Tensor, Tensor]:
        """Every swap: its scope (C,), and the kept and the pruned block that change places, (C,) each."""
        order = self.kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        keep = int(self.kept[0].sum())
        out, in_ = order[:, :keep, None], order[:, None, keep:]
        out, in_ = (x.expand(-1, keep, order.shape[1] - keep) for x in (out, in_))
        scope = torch.arange(len(order), device=order.device)[:, None, None].expand_as(out)
        return scope.flatten(), out.flatten(), in_.flatten()

    def places(self, scope: Tensor, out: Tensor, in_: Tensor) -> Tensor:
        """The columns of each row that a swap turns around: (C, R, F)."""
        row = torch.cat([self.row[scope, out], self.row[scope, in_]], 1)
        column = torch.cat([self.column[scope, out], self.column[scope, in_]], 1)
        return column.gather(1, row.argsort(dim=1, stable=True)).view(
            len(scope), len(self.weight), -1
        )

    def changes(self, places: Tensor) -> Tensor:
        """What each swap adds to the loss: (C,)."""
        r = torch.arange(len(self.weight), device=places.device)[None, :, None]
        inner = self.swept[r[..., None], places[..., :, None], places[..., None, :]]
        outer = self.swept[r, places, -1]
        solved = torch.linalg.solve_ex(inner, outer.unsqueeze(-1)).result.squeeze(-1)
        return (outer * solved).sum((1, 2))

    def swap(self, scope: Tensor, out: Tensor, in_: Tensor, places: Tensor) -> None:
        """Carry one swap out; its parts as 0-dim tensors, its places (R, F)."""
        self.kept[scope, out], self.kept[scope, in_] = False, True
        for r, turned in enumerate(places):
            sweep(self.swept[r], turned)


def sweep(
    matrix: Tensor,  # (n, n) symmetric, changed in place
    index: Tensor,  # (f,) the rows and columns to sweep
) -> None:
    """Goodnight's sweep of several rows at once; a second sweep takes it back, up to signs of ``index``.

    Those signs, of rows and columns alike, cancel in every loss and every change of one.
    """
    columns = matrix[:, index]
    pivot = torch.linalg.inv(columns[index])
    pivot = (pivot + pivot.T) / 2  # else what is not symmetric grows with every sweep
    scaled = columns @ pivot
    matrix.addmm_(scaled, columns.T, alpha=-1.0)
    matrix[:, index] = scaled
    matrix[index] = scaled.T
    matrix[index[:, None], index] = -pivot


def descend(group: Group, most: int) -> int:
    """The best swap, until none helps; how many there were."""
    for count in range(most):
        scope, out, in_ = group.swaps()
        places = group.places(scope, out, in_)
        change = group.changes(places)
        best = change.argmin()
        if float(change[best]) >= -1e-12 * group.loss():
            return count
        group.swap(scope[best], out[best], in_[best], places[best])
    return most


def tabu(group: Group, steps: int, random: torch.Generator) -> Tensor:
    """The blocks of least loss within ``steps`` swaps; a scope rests after it has changed."""
    scopes = len(group.kept)
    until = torch.zeros(scopes, dtype=torch.long, device=group.kept.device)
    rest = max(1, min((scopes - 1) // 2, 10 + scopes // 40))  # and at most twice as long
    rests = (rest + torch.randint(rest + 1, (steps,), generator=random)).tolist()
    loss, best, blocks = group.loss(), group.loss(), group.kept.clone()
    for step in range(steps):
        scope, out, in_ = group.swaps()
        places = group.places(scope, out, in_)
        change = group.changes(places)
        resting = (until[scope] > step) & (loss + change >= best)
        chosen = change.masked_fill(resting, torch.inf).argmin()
        group.swap(scope[chosen], out[chosen], in_[chosen], places[chosen])
        until[scope[chosen]] = step + 1 + rests[step]
        loss = group.loss()
        if loss < best * (1 - 1e-12):
            best, blocks = loss, group.kept.clone()
    return blocks


def groups_of(elements: Tensor, columns: int) -> dict[tuple[int, ...], Tensor]:
    """The rows that scopes join, each row in one group, and the scopes of each group.

    Args:
        elements: (scopes, blocks, size), the places of each block in the flattened weight.
        columns: of the weight.
    """
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, rows in enumerate((elements // columns).flatten(1).tolist()):
        found[tuple(sorted(set(rows)))].append(number)
    if sum(map(len, found)) != len({row for rows in found for row in rows}):
        raise SystemExit("error: in this pattern a row belongs to scopes of different rows")
    return {rows: torch.tensor(scopes) for rows, scopes in sorted(found.items())}


def own_places(elements: Tensor, rows: Sequence[int], columns: int) -> Tensor:
    """Places of blocks in the flattened weight, as places in the flattened ``rows`` of it alone."""
    local = torch.zeros(max(rows) + 1, dtype=torch.long, device=elements.device)
    local[list(rows)] = torch.arange(len(rows), device=elements.device)
    return local[elements // columns] * columns + elements % columns


def starts(
    problem: table.Problem, pattern: str, random: int
) -> dict[str, tuple[Tensor | None, Tensor]]:
    """(pruned weight, mask) by each start: three methods, and masks drawn at random."""
    rival = table.rivals().get("sparsekit/true_obs")
    methods: dict[str, table.Method] = {"sparsegpt": table.sparsegpt}
    if rival is None:
        methods["true_obs"] = table.METHODS["true_obs/largest_first"]
    else:
        methods["sparsekit/true_obs"] = rival
    methods["admm"] = table.admm
    found: dict[str, tuple[Tensor | None, Tensor]] = {}
    for name, method in methods.items():
        pruned = method(problem.weight.clone(), problem.hessian.clone(), pattern, table.Settings())
        if bool(torch.isfinite(pruned).all()):
            found[name] = pruned, pruned != 0
    bound = Pattern.parse(table.PATTERNS[pattern]).bind(tuple(problem.weight.shape))
    generator = torch.Generator().manual_seed(0)
    for number in range(1, random + 1):
        scores = torch.rand(bound.shape, generator=generator)
        found[f"random {number}"] = None, select(scores, bound).to(problem.weight.device)
    return found


def refitted(weight: Tensor, factors: s3.Factors, mask: Tensor) -> Tensor:
    """The exact weights of a mask, row by row, from the Cholesky factor of its part of the Hessian."""
    result = torch.zeros_like(weight)
    linear = weight @ factors.matrix
    for r, kept in enumerate(mask):
        inner = factors.matrix[kept][:, kept]
        result[r, kept] = torch.cholesky_solve(
            linear[r, kept].unsqueeze(1), torch.linalg.cholesky(inner)
        ).squeeze(1)
    return result


def search(
    problem: table.Problem, pattern: str, groups: int, steps: int, random: int, damp: float
) -> Iterator[Row]:
    """A row for each start, as it is done."""
    weight, hessian = problem.weight.double(), problem.hessian.double()
    bound = Pattern.parse(table.PATTERNS[pattern]).bind(tuple(weight.shape))
    elements = tile(torch.arange(weight.numel()).view(bound.shape), bound).to(weight.device)
    columns = weight.shape[1]
    chosen = [
        (list(rows), own_places(elements[scopes], rows, columns))
        for rows, scopes in list(groups_of(elements, columns).items())[:groups]
    ]
    rows = sorted(row for at, _ in chosen for row in at)
    factors = s3.Factors(hessian, damp=damp)
    inverse = factors.inverse()

    def error(pruned: Tensor) -> float:
        return s3.output_error(pruned[rows], weight[rows], hessian)

    def exact(mask: Tensor) -> float:
        result = torch.zeros_like(weight)
        result[rows] = refitted(weight[rows], factors, mask[rows])
        return error(result)

    for name, (given, mask) in starts(problem, pattern, random).items():
        began = time.perf_counter()
        descended, best = mask.clone(), mask.clone()
        swaps, moved, drift = 0, 0, 0.0
        for at, places in chosen:
            kept = mask[at].flatten()[places].any(-1)
            group = Group(weight[at], inverse, places, kept)
            swaps += descend(group, most=10 * len(places))
            descended[at] = group.mask()
            blocks = tabu(group, steps, torch.Generator().manual_seed(at[0]))
            updated = group.loss()
            group.place(group.kept)
            drift = max(drift, abs(updated / group.loss() - 1))
            group.place(blocks)
            best[at] = group.mask()
            moved += int((blocks != kept).any(1).sum())
        yield Row(
            table.PATTERNS[pattern],
            name,
            None if given is None else error(given.double()),
            exact(mask),
            exact(descended),
            exact(best),
            swaps,
            moved / sum(len(places) for _, places in chosen),
            drift,
            time.perf_counter() - began,
        )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--pattern", nargs="+", choices=table.SHORT, default=list(table.SHORT))
    add("--groups", type=int, default=4, help="rows, or sets of coupled rows, that are searched")
    add("--steps", type=int, default=2000, help="swaps of tabu search for each group and start")
    add("--damp", type=float, default=0.0004, help="of the loss searched; that of s3.prune.admm")
    add("--random", type=int, default=1, help="starts from a mask drawn at random")
    table.add_layer(parser)
    add("--out", type=Path, default=Path("demo-out/room.json"), help="where the rows are stored")
    parser.set_defaults(W=None, X=None)  # no layer from files
    args = parser.parse_args(given)
    if args.groups < 1 or args.steps < 0:
        parser.error(f"--groups {args.groups} must be 1 or more, --steps {args.steps} 0 or more")
    table.check_layer(parser, args)
    args.pattern = [table.SHORT[name] for name in args.pattern]
    return args


def main(given: Sequence[str] | None = None) -> list[Row]:
    args = arguments(given)
    device = torch.device(args.device)
    problem = table.problem_of(args, device)
    # Patterns couple at most 16 rows; no method needs more than the rows that are searched.
    problem = replace(problem, weight=problem.weight[: 16 * args.groups])
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "layer": problem.name,
        "samples": problem.samples,
        "groups": args.groups,
        "steps": args.steps,
        "damp": args.damp,
        "device": device_name(device),
        "versions": versions("torch", "triton", "s3tensor", "sparsekit"),
    }
    print(f"{problem.name}: {args.groups} groups of rows, {args.steps} swaps each; error in %")
    columns = ("as given", "refitted", "descent", "search")
    print(f"{'pattern':11}{'start':20}" + "".join(f"{name:>10}" for name in columns))
    again = {table.PATTERNS[name] for name in args.pattern}
    before = rows_before(args.out, record)
    rows = [Row(**row) for row in before if row["pattern"] not in again]
    for pattern in args.pattern:
        for row in search(problem, pattern, args.groups, args.steps, args.random, args.damp):
            rows.append(row)
            errors = (row.as_given, row.refitted, row.descent, row.search)
            shown = "".join(f"{'-':>10}" if e is None else f"{100 * e:10.4f}" for e in errors)
            print(
                f"{row.pattern:11}{row.start:20}{shown}  {row.swaps} swaps of descent, {row.moved:.0%} "
                f"of scopes moved, drift {row.drift:.0e}, {row.seconds:.0f} s",
                flush=True,
            )
            write_json(args.out, {**record, "rows": [asdict(row) for row in rows]})
    return rows


if __name__ == "__main__":
    start(main)
