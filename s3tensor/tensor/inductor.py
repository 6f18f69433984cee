"""Options of ``torch.compile`` for compressed linears: grouped, and started early."""

from __future__ import annotations

import importlib
import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from s3tensor.tensor import frozen, ops

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
        every = ops.linear._opoverload, ops.linear_int8._opoverload, frozen.LINEAR_INFERENCE
        self.targets = targets or every
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

    # transformers copies and compares the options of a model's generate on each call.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GroupLinears):
            return NotImplemented
        return (self.targets, self.merge) == (other.targets, other.merge)

    def __hash__(self) -> int:
        return hash((self.targets, self.merge))

    def __deepcopy__(self, memo: Any) -> GroupLinears:
        return self  # it never changes

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), repr((self.targets, self.merge)))


def _alike(group: list[fx.Node]) -> list[list[fx.Node]]:
    """Of the linears that read one x, those that ``linear_group`` takes together, two or more."""
    found: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in group:
        linear = _read(node)
        if linear is not None:
            found.setdefault((linear.pattern, linear.columns), []).append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


class _Linear(NamedTuple):
    """A compressed linear of a graph, as a group takes it."""

    x: Any
    packed: Any
    indices: Any
    pattern: str
    rows: Any
    columns: Any


def _read(node: fx.Node) -> _Linear | None:
    """The parts of a linear that ``linear_group`` takes; None for one that it does not."""
    if node.kwargs:
        return None
    if node.target is frozen.LINEAR_INFERENCE:
        x, packed, indices, scales, bias, text = node.args
        bound, tiled, transposed = frozen.read_facts(text)  # type: ignore[arg-type]
        given = (scales, bias, transposed or None, None if tiled else True)
        rows, columns = bound.shape
        pattern = str(bound.pattern)
    elif node.target is ops.linear._opoverload and len(node.args) >= 7:
        args: list[Any] = [*node.args, *(False, None, None)[len(node.args) - 7 :]]
        x, packed, indices, bias, pattern, (rows, columns), transposed, tiled, *copies = args
        given = (bias, transposed or None, None if tiled else True, *copies)
    else:
        return None
    if any(value is not None for value in given):
        return None
    return _Linear(x, packed, indices, pattern, rows, columns)


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """One operator in place of linears of one kind that read one x and follow each other."""
    linears = [linear for linear in map(_read, nodes) if linear is not None]
    first = linears[0]
    packed, indices = [one.packed for one in linears], [one.indices for one in linears]
    rows = [one.rows for one in linears]
    with graph.inserting_before(nodes[-1]):  # where the inputs of all are at hand
        whole = graph.call_function(
            ops.linear_group._opoverload, (first.x, packed, indices, first.pattern, rows, True)
        )
        whole.meta["val"] = [node.meta.get("val") for node in nodes]
        for number, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (whole, number))
            part.meta.update(node.meta)
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def compile_config() -> Any:
    """How transformers' ``generate`` compiles a compressed model best: a ``CompileConfig``.

    ``model.generate(..., cache_implementation="static", compile_config=s3.compile_config())``: with a static
    cache transformers compiles the step by itself, by default without :func:`inductor_options`. Needs
    transformers.
    """
    transformers = importlib.import_module("transformers")
    return transformers.CompileConfig(mode=None, options=inductor_options())


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
