"""LoRA on compressed weights, through peft: adapters whose updates keep the mask."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s3tensor.errors import ArgumentError, ModelError, NonFiniteError, OptionError, S3Error
from s3tensor.mask.projection import satisfies
from s3tensor.model.weights import is_conv1d
from s3tensor.tensor import ops
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.sparse import StructuredSparseTensor
from s3tensor.train.masked import Masked

_PLAIN_STARTS = (True, False, "gaussian")  # other values of init_lora_weights read the dense weight


def lora_config(config: Any = None, **options: Any) -> Any:
    """A ``peft.LoraConfig`` under which adapters on compressed weights keep their masks.

    On a layer whose weight is a :class:`~s3tensor.StructuredSparseTensor` the adapter's update is limited
    to the kept weights: the layer computes ``x (W + m s BA)'``, m the mask and s the scaling (SparsePEFT; J.
    P. Muñoz et al., arXiv 2410.03750). So ``merge_and_unload`` gives compressed weights with the same mask
    and the same outputs. Other layers get peft's adapters.

    A training step also costs the dense product BA and, for a moment, a gradient of the weight's shape;
    optimizer states are those of the adapter alone.

    A saved adapter names the patterns of its masks in ``adapter_config.json``. peft then loads it the same
    way again, where s3tensor is imported, on the compressed model.

    Args:
        config: a ``LoraConfig``, changed in place and returned; of an adapter that an earlier s3tensor saved,
            give ``LoraConfig.from_pretrained(folder)`` here, then the result to peft.
        options: of a new ``LoraConfig``: r, lora_alpha, target_modules, lora_dropout, ...

    Example:
        ``model = peft.get_peft_model(model, s3tensor.lora_config(r=8, target_modules=["q_proj"]))``; train;
        ``model = model.merge_and_unload()``.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ArgumentError: both a config and options.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "lora_config needs peft: pip install 's3tensor[peft]'", name=error.name
        ) from error
    if config is not None and options:
        raise ArgumentError(
            "give a LoraConfig, or the options of a new one, not both; set them on the config"
        )
    made = peft.LoraConfig(**options) if config is None else config
    if not isinstance(vars(made).get("masked_patterns"), list):
        # peft's own class would not save the patterns; a subclass of the user's stays, as it saves its own.
        if type(made) is peft.LoraConfig:
            made.__class__ = config_class()
        made.masked_patterns, made._trained_under = [], ()
    made._register_custom_module({nn.Module: _dispatch})
    return made


def register_with_peft() -> None:
    """Let peft read the configurations that :func:`lora_config` makes, wherever it loads an adapter."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    PEFT_TYPE_TO_CONFIG_MAPPING[config_class()().peft_type] = config_class()


def __getattr__(name: str) -> Any:  # so that pickles find the classes that are made on first use
    made = {"SparseLoraConfig": config_class, "SparseLoraLinear": layer_class}.get(name)
    if made is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return made()


@functools.lru_cache(maxsize=1)
def config_class() -> Any:
    """peft's ``LoraConfig`` with the patterns of the masks that an adapter was trained under."""
    from peft import LoraConfig

    class AnyLora(type):
        def __instancecheck__(cls, config: Any) -> bool:
            # peft asks whether a configuration is of the class that it has for LoRA: all of them are.
            return isinstance(config, LoraConfig)

    @dataclasses.dataclass
    class SparseLoraConfig(LoraConfig, metaclass=AnyLora):
        masked_patterns: list[str] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            self._trained_under = tuple(self.masked_patterns or ())
            if self.masked_patterns:
                self._register_custom_module({nn.Module: _dispatch})

        def to_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().to_dict()
            if not found["masked_patterns"]:
                del found["masked_patterns"]
            return found

    SparseLoraConfig.__qualname__ = "SparseLoraConfig"
    return SparseLoraConfig


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Any:
    """For a target that peft asks about: our layer if its weight is compressed, else None for peft's."""
    unwrap: Any = getattr(target, "get_base_layer", lambda: target)
    base = unwrap()
    chain = getattr(base, "parametrizations", {})
    if "weight" in chain and isinstance(chain["weight"][-1], Masked):
        raise ModelError(
            f"a {type(base).__name__} to adapt is still under S3Sparse({chain['weight'][-1].pattern}): peft "
            "would lose the adapter when it merges; call s3tensor.finalize(model) first"
        )
    weight = getattr(base, "weight", None)
    if not isinstance(weight, StructuredSparseTensor):
        _check_not_masked(base, weight, config._trained_under)
        return None
    made = layer_class()(target, adapter_name, config=config, **kwargs)
    config.masked_patterns = sorted({*(config.masked_patterns or ()), str(weight.pattern)})
    return made


def _check_not_masked(base: nn.Module, weight: Any, patterns: Sequence[str]) -> None:
    """Refuse a weight of a pattern that a loaded adapter was trained under, where peft would not mask it."""
    kind, found = "dense", ""
    if isinstance(weight, Compressed):
        kind, found = f"a {type(weight).__name__}", str(weight.pattern)
    elif isinstance(weight, Tensor) and weight.ndim == 2 and not weight.is_meta:
        upright = weight.detach().t() if is_conv1d(base) else weight.detach()
        found = next((pattern for pattern in patterns if _satisfies(upright, pattern)), "")
    if found and found in patterns:
        raise ModelError(
            f"the adapter was trained under the masks of weights compressed to {found}; this "
            f"{type(base).__name__} of {found} is {kind}, and peft would add to pruned weights too: load the "
            "adapter on the compressed model without int8 values, or call s3tensor.sparsify_ first"
        )


def _satisfies(weight: Tensor, pattern: str) -> bool:
    try:
        return satisfies(weight, pattern)
    except S3Error:  # it does not fit
        return False


@functools.lru_cache(maxsize=1)
def layer_class() -> Any:
    """peft's LoRA layer for compressed weights; the class is made on first use, as peft is optional."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class SparseLoraLinear(Linear):
        """A linear layer with a compressed weight, and adapters whose updates are limited to its mask."""

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            return {(): None}

        def update_layer(
            self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any
        ) -> None:
            _check(config)
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

        def packed_update(self, adapter: str) -> Tensor:
            """``s BA`` at the kept weights, packed like the weight: (scopes, keep, block_size)."""
            weight = self.get_base_layer().weight
            update = self.get_delta_weight(adapter)  # as the weight is stored
            laid = (update.t() if weight.transposed else update).contiguous()
            return ops.gather(laid, weight.indices, str(weight.pattern), weight.tiled)

        def packed_sum(self, adapters: Sequence[str], sign: int = 1) -> Tensor:
            """Packed values of the weight and of the updates, rounded once to the weight's dtype."""
            packed: Tensor = self.get_base_layer().weight.packed
            total = packed
            for adapter in adapters:
                total = total + sign * self.packed_update(adapter)  # in the wider of the two dtypes
            return total.to(packed.dtype)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters or self.merged:
                plain: Tensor = super().forward(x, *args, **kwargs)
                return plain
            if args or kwargs:
                raise OptionError(
                    f"adapters on compressed weights take x alone, got {sorted(kwargs) or args}; run rows "
                    "of different adapters in batches of their own"
                )
            active = [name for name in self.active_adapters if name in self.lora_A]
            whole: list[str] = []
            dropping: list[str] = []
            for name in active:
                drops = self.training and isinstance(self.lora_dropout[name], nn.Dropout)
                (dropping if drops else whole).append(name)
            layer = self.get_base_layer()
            result = _product(x, self.packed_sum(whole), layer, layer.bias)
            for name in dropping:  # dropout applies to the adapter's input alone
                update = self.packed_update(name).to(layer.weight.dtype)
                result = result + _product(self.lora_dropout[name](x), update, layer, None)
            return result

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Add the updates to the kept weights, in place; the mask stays."""
            names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
            if names:
                self._write(names, 1, safe_merge)
                self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            """Subtract merged updates from the kept weights, in place, up to rounding."""
            if not self.merged:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
                return
            self._write([name for name in self.merged_adapters if name in self.lora_A], -1)
            self.merged_adapters.clear()

        @torch.no_grad()
        def _write(self, names: list[str], sign: int, safe: bool = False) -> None:
            weight = self.get_base_layer().weight
            packed = self.packed_sum(names, sign)
            if safe and not bool(torch.isfinite(packed).all()):
                raise NonFiniteError(
                    f"the weights merged with {', '.join(names)} hold NaN or Inf; the base was left as it was"
                )
            weight.packed.copy_(packed)
            weight.refresh_()

    SparseLoraLinear.__qualname__ = "SparseLoraLinear"
    return SparseLoraLinear


def _check(config: Any) -> None:
    """Refuse what needs a dense weight.

    Raises:
        OptionError: naming the option.
    """
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise OptionError(
            f"init_lora_weights={config.init_lora_weights!r} on a compressed weight: only "
            f"{', '.join(map(repr, _PLAIN_STARTS))} start without the dense weight"
        )
    for name in ("use_dora", "lora_bias", "use_bdlora", "arrow_config", "alora_invocation_tokens"):
        if getattr(config, name, None):
            raise OptionError(f"{name} is not supported on a compressed weight; leave it out")


def _product(x: Tensor, packed: Tensor, layer: nn.Module, bias: Tensor | None) -> Tensor:
    """``x`` times packed values at the positions of the layer's weight; autocast as for ``F.linear``."""
    weight: Any = layer.weight
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, packed = x.to(dtype), packed.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    shape = list(weight.bound_shape)
    facts = (str(weight.pattern), shape, weight.transposed ^ is_conv1d(layer), weight.tiled)
    return ops.linear(x, packed, weight.indices, bias, *facts)
