"""The chain of blocks that a model is: what each block is called with besides hidden states, and returns."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import ModelError, S3Error
from s3tensor.files import first_line
from s3tensor.llm.calibrate import (
    Call,
    Chunk,
    ModuleInputCatcher,
    Slot,
    check_finite,
    equal_arguments,
    hidden_of,
    is_cache,
    map_tensors,
    split_hidden,
    tensors_in,
)

_PROBE_TOKENS = 16
_Key = int | str  # of an argument: its position after the hidden states, or its name


def catch_chunks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Tensor],  # of (batch, tokens), as :func:`check_batches` gives them
    cache: torch.device | str,
) -> list[Chunk]:
    """Embed every batch and record what each block is called with besides hidden states.

    The blocks do not compute: each passes its input on, so that masks and position embeddings, which
    may differ from block to block, are caught at the cost of the embedding alone. A few tokens are run
    through the whole model first, to check that it is a chain of these blocks.

    Raises:
        ModelError: a model that does not run on token ids alone, or that does more than pass hidden states
            from block to block.
        NonFiniteError: NaN or Inf in the embedding of a batch.
    """
    device = next(model.parameters()).device
    forms = _probe(model, blocks, batches[0][:1, :_PROBE_TOKENS].to(device))
    chunks: list[Chunk] = []
    pool = _Pool(cache)
    for batch in batches:
        calls = _caught(model, blocks, batch.to(device), forms)
        hidden = next(call[0] for call in calls if call is not None).to(cache)
        check_finite(hidden, "the embedding of the calibration tokens")
        written: dict[int, Any] = {}
        extras = [
            None if call is None else _with_slots(call[1], call[2], form.slots, written)
            for call, form in zip(calls, forms, strict=True)
        ]
        chunks.append(
            Chunk(
                hidden,
                pool.keep(extras),
                batch.numel(),
                pool.keep([written[number] for number in sorted(written)]),
            )
        )
    return chunks


@dataclass(frozen=True)
class _Form:
    """How a block is called and what it returns, as seen in a pass of the whole model."""

    called: bool
    # Tuple or list, if it returns one that starts with the hidden states.
    sequence: type | None = None
    # For each later item of it the key of the argument that is passed through, or a value.
    others: tuple[tuple[_Key | None, Any], ...] = ()
    # Numbers of the arguments that blocks write to.
    slots: Mapping[_Key, int] = field(default_factory=dict)


def _caught(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor, forms: Sequence[_Form]
) -> list[Call | None]:
    """What each block is called with when every block passes its hidden states on."""
    called = [block for block, form in zip(blocks, forms, strict=True) if form.called]
    with _passing_on(blocks, forms), ModuleInputCatcher(called) as catcher, torch.no_grad():
        catcher.run(model, input_ids=batch, use_cache=False)
    calls = iter(catcher.inputs)
    return [
        split_hidden(*_only_call(blocks, index, next(calls))) if form.called else None
        for index, form in enumerate(forms)
    ]


def _only_call(blocks: Sequence[nn.Module], index: int, calls: list[Any]) -> Any:
    if len(calls) != 1:
        raise ModelError(
            f"block {index} ({type(blocks[index]).__name__}) is called {len(calls)} times for a "
            "sequence, not once; such a model cannot be pruned block by block"
        )
    return calls[0]


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[_Key, Any]:
    """Arguments by key."""
    found: dict[_Key, Any] = dict(enumerate(args))
    found.update(kwargs)
    return found


def _with_slots(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    slots: Mapping[_Key, int],
    written: dict[int, Any],  # gets the containers, as the first block with each is given it
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with a slot in place of each container that blocks write to."""

    def slotted(key: _Key, value: Any) -> Any:
        if key not in slots:
            return value
        written.setdefault(slots[key], value)
        return Slot(slots[key])

    return (
        tuple(slotted(key, value) for key, value in enumerate(args)),
        {name: slotted(name, value) for name, value in kwargs.items()},
    )


@torch.no_grad()
def _probe(model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor) -> list[_Form]:
    """How each block is called and what it returns.

    Raises:
        ModelError: a model that does not run on token ids alone; a block that is given other hidden states
            than the block before it returned, or arguments that depend on the blocks before it: these
            cannot be caught from blocks that do not compute.
    """
    outs: dict[int, Any] = {}
    held: dict[int, tuple[Any, list[Tensor]]] = {}  # by id: an argument, the tensors in it at first

    def before(block: nn.Module, args: Any, kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            if not isinstance(value, (Tensor, nn.Module)) and not is_cache(value):
                held.setdefault(id(value), (value, tensors_in(value)))

    with ExitStack() as hooks:
        catcher = hooks.enter_context(ModuleInputCatcher(blocks, stop=False))
        for index, block in enumerate(blocks):

            def look(block: nn.Module, args: Any, out: Any, index: int = index) -> None:
                outs[index] = out

            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(look).remove)
        with _as_model_error(model, "on token ids alone"):
            model(input_ids=batch, use_cache=False)  # to its end, in case a block is called again
    calls = catcher.inputs
    if not outs:
        raise ModelError(
            f"{type(model).__name__} calls none of its {len(blocks)} blocks ({type(blocks[0]).__name__}) for "
            "token ids; such a model cannot be pruned block by block"
        )
    changed = [
        value
        for value, first in held.values()
        if list(map(id, tensors_in(value))) != list(map(id, first))
    ]
    for value in changed:
        if not isinstance(value, (dict, UserDict, list)):
            raise ModelError(
                f"the blocks write to a {type(value).__name__} that they are given, which cannot be "
                "copied for each pass; such a model cannot be pruned block by block"
            )
    numbers = {id(value): number for number, value in enumerate(changed)}
    forms = [
        _form(_only_call(blocks, index, calls[index]), outs[index], numbers)
        if index in outs
        else _Form(called=False)
        for index in range(len(blocks))
    ]
    true = [
        split_hidden(*calls[index][0]) if index in outs else None for index in range(len(blocks))
    ]
    with _as_model_error(model, "with blocks that pass their hidden states on"):
        caught = _caught(model, blocks, batch, forms)
    expected: Any = None
    for index, (call, passed, form) in enumerate(zip(true, caught, forms, strict=True)):
        if call is None or passed is None:
            continue
        chained = expected is None or equal_arguments(call[0], expected)
        given, again = (_with_slots(c[1], c[2], form.slots, {}) for c in (call, passed))
        if not chained or not equal_arguments(given, again):
            raise ModelError(
                f"block {index} ({type(blocks[index]).__name__}) is given more than the hidden states "
                "of the block before it; such a model cannot be pruned block by block"
            )
        expected = hidden_of(outs[index])
    return forms


@contextmanager
def _as_model_error(model: nn.Module, how: str) -> Iterator[None]:
    """Raise ModelError for whatever a model raises that does not run so."""
    try:
        yield
    except (S3Error, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        takes = getattr(model, "main_input_name", "input_ids")
        other = "" if takes == "input_ids" else f", it takes {takes}"
        raise ModelError(
            f"{type(model).__name__} does not run {how}{other} ({first_line(error)}). Blocks are pruned in "
            "passes of model(input_ids=..., use_cache=False); for a model of other inputs, pass a module "
            "whose forward of that form runs it"
        ) from error


def _form(call: tuple[tuple[Any, ...], dict[str, Any]], out: Any, numbers: dict[int, int]) -> _Form:
    """The form of a block from its call, what it returned, and the numbers of slots by id of argument."""
    raw = _arguments(*call)
    if not isinstance(hidden_of(out), Tensor):
        raise ModelError(
            f"a block returns {type(out).__name__}, not hidden states or a tuple that starts with them; "
            "such a model cannot be pruned block by block"
        )
    _, args, kwargs = split_hidden(*call)
    slots = {k: numbers[id(v)] for k, v in _arguments(args, kwargs).items() if id(v) in numbers}
    if isinstance(out, Tensor):
        return _Form(called=True, slots=slots)

    def other(item: Any) -> tuple[_Key | None, Any]:
        if item is None or isinstance(item, (bool, int, float, str)):
            return None, item
        return next((key for key, value in raw.items() if value is item), None), None

    kind = list if isinstance(out, list) else tuple
    return _Form(True, kind, tuple(map(other, out[1:])), slots)


@contextmanager
def _passing_on(blocks: Sequence[nn.Module], forms: Sequence[_Form]) -> Iterator[None]:
    """Make blocks return the hidden states that they are given, in the form of what they return."""

    def passing(form: _Form) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not form.called:
                raise ModelError(
                    "some calibration sequences call a block that others do not; such a model cannot be "
                    "pruned block by block"
                )
            hidden = split_hidden(args, kwargs)[0]
            if form.sequence is None:
                return hidden
            given = _arguments(args, kwargs)
            others = (value if key is None else given[key] for key, value in form.others)
            return form.sequence((hidden, *others))

        return forward

    own = [block.__dict__.get("forward") for block in blocks]  # a patch, or a hook of accelerate
    for block, form in zip(blocks, forms, strict=True):
        block.__dict__["forward"] = passing(form)
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


class _Pool:
    """Keeps arguments of blocks on a device, equal tensors once.

    Blocks share masks and position embeddings, and so do batches of one length: a mask of 1024 x 1024
    for each of 30 blocks and 128 batches would take 4 GB.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self._kept: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        # By id, which holding the first of the two keeps unique.
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, value: Any) -> Any:
        """``value`` with its tensors on the device; a tensor equal to a kept one is replaced by that."""
        self._moved.clear()
        return map_tensors(value, self._one)

    def _one(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._moved:
            self._moved[id(tensor)] = tensor, self._known(tensor.to(self.device))
        return self._moved[id(tensor)][1]

    def _known(self, tensor: Tensor) -> Tensor:
        alike = self._kept.setdefault((tensor.shape, tensor.dtype), [])
        for known in alike:
            if torch.equal(known, tensor):
                return known
        if len(alike) < 8:  # with more, each is likely different, and comparing is wasted
            alike.append(tensor)
        return tensor
