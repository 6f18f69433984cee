"""Options of ``torch.compile`` for compressed linears: grouped, and started early."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from s3tensor.tensor import ops

_MOST = 3  # weights of one launch


class GroupLinears(CustomGraphPass):
    """Put the compressed linears that read one x next to each other: query, key and value, gate and up.

    Two or three that a kernel takes together become one ``s3tensor::linear_group``. Others, among them those
    with int8 values, gain by being neighbours: a kernel for packed weights starts to read its weight while
    the kernel before it drains (programmatic dependent launch), if nothing lies between the two. What
    follows several of them, such as norms and rotary embeddings, fuses into one kernel.

    Args:
        targets: the operators to group, by their first argument.
        merge: whether compressed linears may become one operator; otherwise they only become neighbours.
    """

    def __init__(self, targets: tuple[Any, ...] = (), merge: bool = True) -> None:
        self.targets = targets or (ops.linear._opoverload, ops.linear_int8._opoverload)
        self.merge = merge

    def __call__(self, graph: fx.Graph) -> None:
        groups = self._neighbours(graph)
        for group in groups if self.merge else []:
            for alike in _alike(group):
                for start in range(0, len(alike) - 1, _MOST):
                    _join(graph, alike[start : start + _MOST])

    def _neighbours(self, graph: fx.Graph) -> list[list[fx.Node]]:
        """Reorder the graph; returns the linears that now follow each other, in their order."""
        groups: list[list[fx.Node]] = []
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
                next(group for group in groups if leader in group).append(node)
            else:
                groups.append([node])
            last[x] = node
        return groups

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
        return get_hash_for_files((__file__,), repr((self.targets, self.merge)))


def _alike(group: list[fx.Node]) -> list[list[fx.Node]]:
    """Of the linears that read one x, those that ``linear_group`` takes together, two or more."""
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in group:
        kind = _kind(node)
        if kind is not None:
            found.setdefault(kind, []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _kind(node: fx.Node) -> tuple[Any, ...] | None:
    """What the linears of a group have in common; None for one that no group takes."""
    if node.target is not ops.linear._opoverload or node.kwargs or len(node.args) < 7:
        return None
    given: list[Any] = [*node.args, *(False, None, None)[len(node.args) - 7 :]]
    bias, pattern, shape, transposed, tiled, dense, vendor = given[3:]
    if bias is not None or transposed or not tiled or dense is not None or vendor is not None:
        return None
    return pattern, shape[1]


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """One operator in place of linears of one kind that read one x and follow each other."""
    x, pattern = nodes[0].args[0], nodes[0].args[4]
    packed, indices = ([node.args[i] for node in nodes] for i in (1, 2))
    rows = [node.args[5][0] for node in nodes]  # type: ignore[index]
    with graph.inserting_before(nodes[-1]):  # where the inputs of all are at hand
        whole = graph.call_function(
            ops.linear_group._opoverload, (x, packed, indices, pattern, rows, True)
        )
        whole.meta["val"] = [node.meta.get("val") for node in nodes]
        for number, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (whole, number))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def inductor_options(**more: Any) -> dict[str, Any]:
    """Options for ``torch.compile(model, fullgraph=True, options=s3.inductor_options())`` at small batches.

    Linears of one x run in one launch or as neighbours, CUDA graphs are on, as in
    ``mode="reduce-overhead"``, and on Hopper and later GPUs Inductor's own kernels let the next kernel
    start early, where this torch knows how to. Options that it does not know are left out.

    Args:
        more: further options of Inductor, which override these; write a dot in a name as two underscores,
            as in ``triton__cudagraphs=False``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> _ = s3.sparsify_(model, "2:4")
        >>> call = torch.compile(model, fullgraph=True, options=s3.inductor_options())
    """
    known = torch._inductor.list_options()
    options: dict[str, Any] = {
        "post_grad_custom_post_pass": GroupLinears(),
        "reorder_for_peak_memory": False,  # it would separate what the pass put together
        "triton.cudagraphs": True,
    }
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
        options["triton.enable_pdl"] = True
    options = {name: value for name, value in options.items() if name in known}
    return options | {name.replace("__", "."): value for name, value in more.items()}
