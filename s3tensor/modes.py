"""Ambient modes of torch: what s3tensor computes does not depend on those that its caller has set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from s3tensor.errors import OptionError

_AUTOCAST = ("cpu", "cuda", "xpu", "mps")  # devices that have it
_lock = threading.Lock()
_inside, _outside = 0, torch.float32  # contexts that hold the default dtype, and what it was before


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """Compute as a fresh program does, also as a decorator: without the modes that the caller has set.

    Inside there is no autograd, inference mode or autocast, the default dtype is float32 and the default
    device the CPU; on leaving, all are as before. Tensors made inside are ordinary ones, not those of
    inference mode. Casts of weights that autocast has cached are dropped, since the weights may have
    changed. Deterministic algorithms and the precision of float32 products stay as they are. While
    ``torch.compile`` traces, nothing changes.

    Raises:
        OptionError: inside a ``FakeTensorMode``, where tensors have no values.
    """
    if torch.compiler.is_compiling():
        yield
        return
    if _is_fake():
        raise OptionError(
            "a FakeTensorMode is active, under which tensors have no values to compute with; leave it "
            "before this call"
        )
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for device in filter(torch.is_autocast_enabled, _AUTOCAST):
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.autocast(device, enabled=False))
        if _inside or torch.get_default_dtype() != torch.float32:
            stack.enter_context(_float32())
        modes = torch._C._len_torch_function_stack()  # among them that of a default device
        if modes and torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def _float32() -> Iterator[None]:
    """Float32 as the default dtype, which is that of all threads: the last to leave restores it."""
    global _inside, _outside
    with _lock:
        if not _inside:
            _outside = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_default_dtype(_outside)


def ordinary(x: Tensor) -> Tensor:
    """``x``, or a copy if it was made in inference mode, which autograd and changes in place refuse."""
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def ordinary_(model: nn.Module) -> None:
    """Replace the parameters and buffers that were made in inference mode by ordinary copies."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by id: holding the first keeps it unique
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in made:
                    copy = ordinary(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        copy = nn.Parameter(copy, tensor.requires_grad)
                    made[id(tensor)] = tensor, copy
                held[name] = made[id(tensor)][1]  # type: ignore[assignment]


def check_real(x: Tensor) -> None:
    """Refuse a tensor with values inside a ``FakeTensorMode``, which would make others without.

    Raises:
        OptionError: with the remedy.
    """
    if torch.compiler.is_compiling() or not _is_fake():
        return
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(x, FakeTensor):
        raise OptionError(
            "a FakeTensorMode is active and the tensor given has values; leave the mode, or make the "
            "tensor inside it"
        )


def _is_fake() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
