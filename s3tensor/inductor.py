"""Options of ``torch.compile`` with which compressed linears run best: their order, and early starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from s3tensor import ops


class GroupLinears(CustomGraphPass):
    """Put the compressed linears that read one x next to each other: query, key and value, gate and up.

    A kernel for packed weights starts to read its weight while the one before it drains
    (programmatic dependent launch), but only where nothing lies between the two. And what follows on
    several of them, such as norms and rotary embeddings, fuses into one kernel.

    Args:
        targets: the operators to group, by their first argument.
    """

    def __init__(self, targets: tuple[Any, ...] = ()) -> None:
        self.targets = targets or (ops.linear._opoverload,)

    def __call__(self, graph: fx.Graph) -> None:
        place = {node: number for number, node in enumerate(graph.nodes)}
        last: dict[fx.Node, fx.Node] = {}  # the last linear of each x
        for node in list(graph.nodes):
            if node.target not in self.targets:
                continue
            x = node.args[0]
            leader = last.get(x)
            if leader is not None and self._bring_inputs(node, leader, place):
                leader.append(node)
                place[node] = place[leader]
            last[x] = node

    @staticmethod
    def _bring_inputs(node: fx.Node, leader: fx.Node, place: dict[fx.Node, int]) -> bool:
        """Move what the node reads before its leader, where that needs no more than one step."""
        late = [arg for arg in node.all_input_nodes if place[arg] >= place[leader]]
        if any(place[arg] >= place[leader] for one in late for arg in one.all_input_nodes):
            return False
        for arg in late:
            leader.prepend(arg)
            place[arg] = place[leader] - 1
        return True

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), repr(self.targets))


def inductor_options(**more: Any) -> dict[str, Any]:
    """Options for ``torch.compile(model, fullgraph=True, options=s3.inductor_options())`` at small batches.

    Linears of one x become neighbours, CUDA graphs are on, as in ``mode="reduce-overhead"``, and on
    Hopper and later GPUs Inductor's own kernels let the next kernel start early, where this torch knows
    how to. Options that it does not know are left out.

    Args:
        more: further options of Inductor, which count before these; a dot in a name is written as two
            underscores, as in ``triton__cudagraphs=False``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> _ = s3.sparsify_(model, "2:4")
        >>> call = torch.compile(model, fullgraph=True, options=s3.inductor_options())
    """
    known = torch._inductor.list_options()
    options: dict[str, Any] = {
        "post_grad_custom_post_pass": GroupLinears(),
        "reorder_for_peak_memory": False,  # it would part what the pass put together
        "triton.cudagraphs": True,
    }
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        options["triton.enable_pdl"] = True
    options = {name: value for name, value in options.items() if name in known}
    return options | {name.replace("__", "."): value for name, value in more.items()}
