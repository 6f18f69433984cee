"""Catch the inputs of modules, move them between devices, and run blocks over cached inputs."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s3tensor.errors import CalibrationError, ModelError, NonFiniteError
from s3tensor.text.text import check_tokens

Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]  # hidden states and the other arguments


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
    if isinstance(value, UserDict):
        made = copy.copy(value)
        made.data = map_tensors(value.data, change)
        return made
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers, or among the attributes of another object, in their order."""
    found: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    known = isinstance(value, (Tensor, tuple, list, dict, UserDict))
    map_tensors(value if known else getattr(value, "__dict__", None), look)
    return found


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


@dataclass(frozen=True)
class Slot:
    """Stands among a block's arguments for a container that blocks write to: shared keys and values."""

    number: int


@dataclass
class Chunk:
    """One batch of calibration sequences on its way through the blocks."""

    # Input of the next block, on the cache device: (batch, tokens, hidden), or with more dims.
    hidden: Tensor
    # For each block its other arguments; None for one that is not called.
    extras: list[tuple[tuple[Any, ...], dict[str, Any]] | None]
    tokens: int = 0  # in the batch; of the hidden states where these have one row for each
    written: list[Any] = field(
        default_factory=list
    )  # the container of each slot, on the cache device

    def __post_init__(self) -> None:
        # Several rows for each token, as in Gemma 3n (streams, batch, tokens, hidden), have more dims.
        if not self.tokens or self.hidden.ndim <= 3:
            self.tokens = self.hidden.shape[:-1].numel()

    def twin(self) -> Chunk:
        """The same batch for another stream, which goes its own way from here."""
        return Chunk(self.hidden, self.extras, self.tokens, list(self.written))

    def advance(self, hidden: Tensor, copied: list[Any], first: list[Tensor]) -> None:
        """Go past a block.

        Args:
            hidden: what the block returned.
            copied: the containers that :meth:`call` gave, as the block left them.
            first: the tensors that were in them before.
        """
        cache = self.hidden.device
        self.hidden = hidden.to(cache)
        # What the block left alone is not copied: equal tensors stay one for all batches.
        known = {id(new): old for new, old in zip(first, tensors_in(self.written), strict=True)}
        self.written = map_tensors(
            copied, lambda x: known[id(x)] if id(x) in known else x.to(cache)
        )

    def call(
        self, block: int, device: torch.device | str
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Any]]:
        """A block's other arguments on a device, and the containers among them: copies of this stream's."""
        extras = self.extras[block]
        assert extras is not None
        args, kwargs = transfer_to_device(extras, device)
        written = transfer_to_device(self.written, device)

        def filled(value: Any) -> Any:
            return written[value.number] if isinstance(value, Slot) else value

        args = tuple(map(filled, args))
        return args, {name: filled(value) for name, value in kwargs.items()}, written


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


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A block's hidden states and its other arguments; key-value caches are left out.

    Raises:
        ModelError: no tensor comes first, nor one named ``hidden_states``.
    """
    kwargs = {name: value for name, value in kwargs.items() if not is_cache(value)}
    args = tuple(None if is_cache(value) else value for value in args)
    hidden = args[0] if args else kwargs.pop("hidden_states", None)
    if not isinstance(hidden, Tensor):
        raise ModelError(
            "the decoder blocks take no hidden states as their first argument, nor as hidden_states; "
            "such a model cannot be pruned block by block"
        )
    return hidden, args[1:], kwargs


def is_cache(value: object) -> bool:
    return any(cls.__name__ == "Cache" for cls in type(value).__mro__)


def hidden_of(out: Any) -> Any:
    """The hidden states among what a block returned."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


def equal_arguments(first: Any, second: Any) -> bool:
    """Equality of nested arguments, with NaN equal to itself; only tensors and containers are compared."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        second = second.to(first.device)
        if first.shape != second.shape:
            return False
        return bool(((first == second) | ((first != first) & (second != second))).all())
    if isinstance(first, UserDict) and isinstance(second, UserDict):
        first, second = first.data, second.data
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(map(equal_arguments, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            equal_arguments(first[k], second[k]) for k in first
        )
    return isinstance(first, Tensor) == isinstance(second, Tensor)


def has_room(device: torch.device, nbytes: int, share: float) -> bool:
    """Whether so many bytes fit in a share of a GPU's free memory; False for other devices."""
    if device.type != "cuda":
        return False
    free = torch.cuda.mem_get_info(device)[0]
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return nbytes <= share * (free + unused)


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
        # Of the last pass: its chunk, the containers that the block wrote to, the tensors in them before.
        self._last: tuple[Chunk, list[Any], list[Tensor]] | None = None

    def advance(self, chunk: Chunk, hidden: Tensor) -> None:
        """Move a chunk past the block, of which the last pass, over this chunk, gave ``hidden``."""
        assert self._last is not None and self._last[0] is chunk
        chunk.advance(hidden, *self._last[1:])
        self._last = None

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
            on_input: gets the input, or None where it holds neither every token (a routed expert) nor an
                argument of the block, such as the states that cross-attention reads, and
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
        args, kwargs, written = chunk.call(self.index, self.device)
        self._last = chunk, written, tensors_in(written)
        arguments = set(map(id, tensors_in([args, kwargs])))
        with ExitStack() as hooks:
            for index, layer in enumerate(layers):

                def before(_: nn.Module, a: Any, k: Any, index: int = index) -> None:
                    assert on_input is not None
                    on_input(index, _whole_input(a, k, chunk, arguments))

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


def _whole_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], chunk: Chunk, arguments: set[int]
) -> Tensor | None:
    """The input of a call of a linear if it holds every token of the chunk, or is an argument, given by id.

    An argument is the same in the dense and in the pruned model, so that its rows can be compared.
    """
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    rows = given.shape[:-1].numel()
    whole = rows in (chunk.tokens, chunk.hidden.shape[:-1].numel())
    return given if whole or id(given) in arguments else None


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
