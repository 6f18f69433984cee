"""Catch the inputs of modules, move them between devices, and run blocks over cached inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s3tensor.errors import CalibrationError, ModelError, NonFiniteError
from s3tensor.text.text import check_tokens

_PROBE_TOKENS = 16
_Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # hidden states and the other arguments


def transfer_to_device(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor in it on ``device``; tuples, lists and dicts are rebuilt.

    A tensor that is already there is not copied. Other objects pass through unchanged.
    """
    return map_tensors(value, lambda tensor: tensor.to(device))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed; tuples, lists and dicts are rebuilt."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(item, change) for item in value]
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


class _Caught(Exception):
    """Raised inside a forward pass to end it early; never leaves this module."""


class _Reached(_Caught, RuntimeError):
    """Raised at a module that was attached with ``raise_error``."""


class _Arguments(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class CaughtCall(_Arguments):
    """The arguments of one call: ``args, kwargs = call``, ``call.args`` or ``call["args"]``."""

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if key in self._fields else super().__getitem__(key)


class ModuleInputCatcher:
    """Records the inputs of modules and, if wanted, ends the forward pass once the last is reached.

    Args:
        modules: one module or several (a ``ModuleList`` is several); ``inputs[i]`` are the calls of
            ``modules[i]`` in order. Without modules, :meth:`attach` them by name: ``inputs[name]``. A device
            in this place is ``device``.
        device: where recorded tensors are kept; ``None`` leaves them where they are.
        stop: end the forward pass when the last of ``modules`` is called, so that nothing after it is
            computed. Then run the pass inside :meth:`run`.

    Example:
        >>> linear = nn.Linear(4, 2)
        >>> with ModuleInputCatcher(linear) as catcher:
        ...     _ = catcher.run(nn.Sequential(linear, nn.ReLU()), torch.ones(3, 4))
        >>> args, kwargs = catcher.inputs[0][0]
        >>> args[0].shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module] | torch.device | str | None = None,
        device: torch.device | str | None = None,
        stop: bool = True,
    ) -> None:
        if isinstance(modules, (torch.device, str)):
            modules, device = None, modules
        self.inputs: Any  # by index, or by name where modules are attached
        by_name = modules is None
        modules = [] if modules is None else modules
        several = not isinstance(modules, nn.Module) or isinstance(modules, nn.ModuleList)
        self.modules: list[nn.Module] = list(modules) if several else [modules]  # type: ignore[arg-type, list-item]
        self.device = device
        self.stop = stop
        self.inputs = {} if by_name else [[] for _ in self.modules]
        self._hooks = ExitStack()
        self._attached: dict[str, Any] = {}  # handles of hooks

    def __enter__(self) -> ModuleInputCatcher:
        for index, module in enumerate(self.modules):
            last = index == len(self.modules) - 1
            hook = self._hook(self.inputs[index], _Caught if self.stop and last else None)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.close()
        for handle in self._attached.values():
            handle.remove()
        self._attached.clear()

    def attach(self, module: nn.Module, name: str, raise_error: bool = False) -> None:
        """Record the calls of a module in ``inputs[name]`` until :meth:`detach`.

        With ``raise_error`` its call then ends the forward pass with a RuntimeError, which :meth:`run`
        catches.

        Raises:
            ModelError: a name that is attached, or a catcher that was made for modules.
        """
        if isinstance(self.inputs, list):
            raise ModelError(
                "this catcher was made for modules; make one without to attach by name"
            )
        if name in self._attached:
            raise ModelError(
                f"{name!r} is attached already; detach it first, or choose another name"
            )
        calls = self.inputs.setdefault(name, [])
        hook = self._hook(calls, _Reached if raise_error else None)
        self._attached[name] = module.register_forward_pre_hook(hook, with_kwargs=True)

    def detach(self, name: str) -> None:
        """Stop recording a module, and forget its calls.

        Raises:
            ModelError: a name that is not attached.
        """
        if name not in self._attached:
            raise ModelError(
                f"{name!r} is not attached; there are: {', '.join(self._attached) or 'none'}"
            )
        self._attached.pop(name).remove()
        del self.inputs[name]

    def _hook(self, calls: list[CaughtCall], end: type[Exception] | None) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = CaughtCall(args, kwargs)
            if self.device is not None:
                call = transfer_to_device(call, self.device)
            calls.append(call)
            if end is not None:
                raise end("the forward pass ended at the module whose inputs were wanted")

        return record

    def run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``module(*args, **kwargs)``, or ``None`` when the pass was ended early."""
        try:
            return module(*args, **kwargs)
        except _Caught:
            return None

    def pop(self, index: int | str = 0) -> CaughtCall:
        """The oldest recorded call of one module, by its index or name, forgotten here."""
        call: CaughtCall = self.inputs[index].pop(0)
        return call


@dataclass
class Chunk:
    """One batch of calibration sequences on its way through the blocks."""

    hidden: Tensor  # (batch, tokens, hidden), input of the next block, on the cache device
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]]  # for each block its other arguments


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
        ModelError: a model that does more than pass hidden states from block to block.
        NonFiniteError: NaN or Inf in the embedding of a batch.
    """
    device = next(model.parameters()).device
    tuples = _probe(model, blocks, batches[0][:1, :_PROBE_TOKENS].to(device))
    chunks: list[Chunk] = []
    pool = _Pool(cache)
    for batch in batches:
        calls = _caught(model, blocks, batch.to(device), tuples)
        hidden = calls[0][0].to(cache)
        check_finite(hidden, "the embedding of the calibration tokens")
        chunks.append(Chunk(hidden, pool.keep([call[1:] for call in calls])))
    return chunks


def check_batches(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """The batches in a dtype that embeddings take.

    Raises:
        CalibrationError: no batches, not (batch, tokens) of integers, ids beyond the vocabulary, or
            more tokens than the model has positions.
    """
    if not batches:
        raise CalibrationError(
            "calibration is empty; give an iterable of (batch, tokens) token tensors"
        )
    ready = []
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 2 or not _is_integer(batch.dtype):
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise CalibrationError(
                f"calibration must hold (batch, tokens) tensors of token ids, got {found}; stack "
                "sequences with torch.stack, or use s3tensor.llm.calibration_tokens"
            )
        if batch.numel() == 0:
            raise CalibrationError(
                f"a calibration batch of shape {tuple(batch.shape)} holds no tokens"
            )
        ready.append(batch if batch.dtype in (torch.int64, torch.int32) else batch.long())
        check_tokens(model, ready[-1], batch.shape[1])
    return ready


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _caught(
    model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor, tuples: Sequence[bool]
) -> list[_Call]:
    """What each block is called with when every block passes its hidden states on."""
    with _passing_on(blocks, tuples), ModuleInputCatcher(blocks) as catcher, torch.no_grad():
        catcher.run(model, input_ids=batch, use_cache=False)
    return [_only_call(blocks, index, catcher.inputs[index]) for index in range(len(blocks))]


def _only_call(blocks: Sequence[nn.Module], index: int, calls: list[Any]) -> _Call:
    if len(calls) != 1:
        raise ModelError(
            f"block {index} ({type(blocks[index]).__name__}) is called {len(calls)} times for a "
            "sequence, not once; such a model cannot be pruned block by block"
        )
    return split_hidden(*calls[0])


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """A block's hidden states and its other arguments; key-value caches are left out.

    Raises:
        ModelError: no tensor comes first, nor one named ``hidden_states``.
    """
    kwargs = {name: value for name, value in kwargs.items() if not _is_cache(value)}
    args = tuple(None if _is_cache(value) else value for value in args)
    hidden = args[0] if args else kwargs.pop("hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise ModelError(
            "the decoder blocks take no hidden states as their first argument, nor as hidden_states; "
            "such a model cannot be pruned block by block"
        )
    return hidden, args[1:], kwargs


def _is_cache(value: object) -> bool:
    return any(cls.__name__ == "Cache" for cls in type(value).__mro__)


@torch.no_grad()
def _probe(model: nn.Module, blocks: Sequence[nn.Module], batch: Tensor) -> list[bool]:
    """Whether each block returns a tuple, as in older models, or its hidden states alone.

    Raises:
        ModelError: a block that is given other hidden states than the block before it returned, or
            arguments that depend on the blocks before it: these cannot be caught from blocks that do
            not compute.
    """
    outs: list[Any] = []

    def look(block: nn.Module, args: Any, out: Any) -> None:
        outs.append(out)

    with ExitStack() as hooks:
        catcher = hooks.enter_context(ModuleInputCatcher(blocks, stop=False))
        for block in blocks:
            hooks.callback(block.register_forward_hook(look).remove)
        model(input_ids=batch, use_cache=False)  # to its end, in case a block is called again
    true = [_only_call(blocks, index, catcher.inputs[index]) for index in range(len(blocks))]
    tuples = [isinstance(out, tuple) for out in outs]
    caught = _caught(model, blocks, batch, tuples)
    for index in range(len(blocks)):
        chained = index == 0 or equal_arguments(true[index][0], hidden_of(outs[index - 1]))
        if not chained or not equal_arguments(true[index][1:], caught[index][1:]):
            raise ModelError(
                f"block {index} ({type(blocks[index]).__name__}) is given more than the hidden states "
                "of the block before it; such a model cannot be pruned block by block"
            )
    return tuples


def hidden_of(out: Any) -> Tensor:
    """The hidden states among what a block returned."""
    return out[0] if isinstance(out, tuple) else out


def equal_arguments(first: Any, second: Any) -> bool:
    """Equality of nested arguments, with NaN equal to itself; only tensors and containers are compared."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        second = second.to(first.device)
        if first.shape != second.shape:
            return False
        return bool(((first == second) | ((first != first) & (second != second))).all())
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(equal_arguments, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            equal_arguments(first[k], second[k]) for k in first
        )
    return isinstance(first, Tensor) == isinstance(second, Tensor)


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


def has_room(device: torch.device, nbytes: int, share: float) -> bool:
    """Whether so many bytes fit in a share of a GPU's free memory; False for other devices."""
    if device.type != "cuda":
        return False
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return nbytes <= share * (free + unused)


@contextmanager
def _passing_on(blocks: Sequence[nn.Module], tuples: Sequence[bool]) -> Iterator[None]:
    """Make blocks return the hidden states that they are given, in a tuple if they return tuples."""

    def passing(as_tuple: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = split_hidden(args, kwargs)[0]
            return (hidden,) if as_tuple else hidden

        return forward

    for block, as_tuple in zip(blocks, tuples, strict=True):
        block.__dict__["forward"] = passing(as_tuple)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


OnInput = Callable[
    [int, Tensor | None], object
]  # index of a layer; its input, None if not of every token
OnOutput = Callable[
    [int, Any], Any
]  # index of a layer and its output; a tensor returned replaces it


class BlockRunner:
    """Runs one block over chunks: whole, or only until a layer inside has its input."""

    def __init__(
        self, block: nn.Module, index: int, name: str, device: torch.device, cache: torch.device
    ) -> None:
        self.block = block
        self.index = index
        self.name = name  # in the model
        self.device = device
        self.cache = cache

    @torch.no_grad()
    def output(
        self,
        chunk: Chunk,
        layers: Sequence[nn.Module] = (),
        on_input: OnInput | None = None,
        on_output: OnOutput | None = None,
    ) -> Tensor:
        """The block's output hidden states, on the block's device.

        Args:
            chunk: the block's input.
            layers: modules inside the block; at each of their calls, with their index here,
            on_input: gets the input, or None where it does not hold every token (a routed expert), and
            on_output: gets the output, and may return a tensor in its place.

        Raises:
            NonFiniteError: NaN or Inf in the output, naming the layer from which it came.
        """
        out = self._run(chunk, layers, on_input, on_output)
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError(
                f"{self._source(chunk)} gives NaN or Inf on the calibration tokens; load the model in "
                "float32 or bfloat16, and look for damaged weights there"
            )
        return out

    @torch.no_grad()
    def layer_input(self, chunk: Chunk, layer: nn.Module) -> Tensor | None:
        """The input of ``layer``, with nothing after it computed; None where it does not see every token."""
        inputs: list[Tensor | None] = []

        def stop(_: int, given: Tensor | None) -> None:
            inputs.append(given)
            raise _Caught

        with suppress(_Caught):
            self._run(chunk, [layer], stop)
        return inputs[0] if inputs else None

    def layer_inputs(
        self, chunk: Chunk, layers: Sequence[nn.Module], keep: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The block's output, and the input of each layer on the cache device, from one pass.

        None for a layer that does not see every token. Without ``keep`` the inputs are empty tensors.
        """
        inputs: list[Tensor | None] = [None] * len(layers)

        def record(index: int, given: Tensor | None) -> None:
            if given is not None and inputs[index] is None:
                # A copy: what comes after may change it in place, or it is part of a larger tensor.
                inputs[index] = (given if keep else given[:0]).to(self.cache, copy=True)

        return self.output(chunk, layers, record), inputs

    @torch.no_grad()
    def input_groups(self, chunk: Chunk, layers: Sequence[nn.Module]) -> list[list[int]]:
        """Indices of ``layers`` in order of call, grouped by the tensor they are given.

        Layers that are not called, or not with every token, are in no group.
        """
        inputs: dict[int, Tensor | None] = {}  # of first calls; held, so that ids are unique
        self._run(chunk, layers, inputs.setdefault)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, given in inputs.items():
            if given is not None:
                groups.setdefault((id(given), given.shape[-1]), []).append(index)
        return list(groups.values())

    def _run(
        self,
        chunk: Chunk,
        layers: Sequence[nn.Module],
        on_input: OnInput | None = None,
        on_output: OnOutput | None = None,
    ) -> Tensor:
        args, kwargs = transfer_to_device(chunk.extras[self.index], self.device)
        with ExitStack() as hooks:
            for index, layer in enumerate(layers):

                def before(_: nn.Module, a: Any, k: Any, index: int = index) -> None:
                    assert on_input is not None
                    on_input(index, _whole_input(a, k, chunk))

                def after(_: nn.Module, a: Any, out: Any, index: int = index) -> Any:
                    assert on_output is not None
                    return on_output(index, out)

                if on_input is not None:
                    hook = layer.register_forward_pre_hook(before, with_kwargs=True)
                    hooks.callback(hook.remove)
                if on_output is not None:
                    hooks.callback(layer.register_forward_hook(after).remove)
            # Always a copy: some blocks add to their input in place.
            return hidden_of(self.block(chunk.hidden.to(self.device, copy=True), *args, **kwargs))

    def _source(self, chunk: Chunk) -> str:
        """Name of the first module in the block whose output is not finite."""
        modules = dict(self.block.named_modules())
        found: list[int] = []

        def look(index: int, out: Any) -> None:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            if isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(index)
                raise _Caught

        with suppress(_Caught):
            self._run(chunk, list(modules.values()), on_output=look)
        name = list(modules)[found[0]] if found else ""
        return f"{self.name}.{name}" if name else self.name


def _whole_input(args: tuple[Any, ...], kwargs: dict[str, Any], chunk: Chunk) -> Tensor | None:
    """The input of a call of a linear if it holds every token of the chunk."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given if given.shape[:-1].numel() == chunk.hidden.shape[:-1].numel() else None


def check_finite(x: Tensor, where: str) -> None:
    """Refuse NaN and Inf in activations, by name of the place.

    Raises:
        NonFiniteError: naming ``where``.
    """
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{where} holds NaN or Inf; load the model in float32 or bfloat16, and look for damaged "
            "weights before it"
        )
