"""Compressed models in transformers: ``from_pretrained`` loads them, ``save_pretrained`` writes them.

To transformers a pruned model is a quantized one, of the method ``"s3"``. While it loads, each sparse weight
is a small module with the parameters ``packed``, ``indices`` and, with int8 values, ``scales``, with the
names, shapes and dtypes of what is stored: transformers itself places, casts and counts them, and no dense
weight is ever made. When all is loaded, the compressed tensor replaces the module.

Importing this module registers the method; :mod:`s3tensor.io.registration` imports it once transformers is
imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from s3tensor.errors import CheckpointError, ModelError
from s3tensor.files import first_line
from s3tensor.io.folder import FORMAT, METHOD, quantization, tied_names, unshared_state
from s3tensor.io.state import METADATA_KEY, flatten_state, open_weights, read_description
from s3tensor.model.linear import put_parameter
from s3tensor.model.weights import model_weights
from s3tensor.pattern import Pattern
from s3tensor.tensor.base import Compressed
from s3tensor.tensor.int8 import VALUES, class_of
from s3tensor.tensor.int8_values import DTYPES

_INTEGERS, _FLOATS = (
    {torch.uint8: "U8", torch.int8: "I8"},
    {"F64", "F32", "F16", "BF16"},
)  # of safetensors
_OLDEST = (5, 0)  # earlier versions of transformers do not save and load compressed weights whole


class S3Config(QuantizationConfigMixin):
    """The ``quantization_config`` of a compressed model, made when one is saved.

    Attributes:
        patterns: the name of each sparse weight's pattern, by weight.
        definitions: the patterns spelled out, by name.
        transposed: the weights that are transposed views, such as those of GPT-2.
        int8: the weights with int8 values; absent without such.
        format: version of this entry.
    """

    def __init__(
        self,
        patterns: Mapping[str, str] | None = None,
        definitions: Mapping[str, str] | None = None,
        transposed: list[str] | None = None,
        int8: list[str] | None = None,
        format: int = FORMAT,
        **_: Any,  # quant_method, and what later versions add
    ) -> None:
        self.quant_method = METHOD
        self.format = format
        self.definitions = {} if definitions is None else definitions
        self.patterns = {} if patterns is None else patterns
        self.transposed = [] if transposed is None else transposed
        if int8:
            self.int8 = int8


class S3Quantizer(HfQuantizer):
    """Loads and saves the weights that an :class:`S3Config` names.

    Raises:
        CheckpointError: a configuration that is damaged, or of a later format.
        ModelError: a model that is not pruned yet, or a device_map that leaves weights on the disk.
    """

    requires_calibration = True
    quantization_config: S3Config

    def __init__(self, quantization_config: S3Config, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ModelError(
                "S3Config describes a model that is pruned already; prune one with "
                "s3tensor.llm.prune_model and save it with s3tensor.save_pretrained"
            )
        super().__init__(quantization_config, **kwargs)
        config = quantization_config
        if type(config.format) is not int or config.format != FORMAT:
            raise CheckpointError(
                f"quantization_config has format {config.format!r:.40}, this version of s3tensor reads "
                f"{FORMAT}; update s3tensor"
            )
        tables = config.patterns, config.definitions
        lists = config.transposed, getattr(config, "int8", [])
        sound = all(isinstance(names, list) for names in lists)
        sound = sound and all(isinstance(table, dict) for table in tables)
        if not sound or not all(
            isinstance(text, str)
            for group in (*lists, *(item for table in tables for item in table.items()))
            for text in group
        ):
            raise CheckpointError("quantization_config is damaged: its tables must be of strings")
        self._loading: list[tuple[str, nn.Module, str, dict[str, Any]]] = []
        # Names of the parameters of a sparse weight's owner, in their order.
        self._orders: dict[nn.Module, list[str]] = {}

    # before weights are read --------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device_map that offloads: hooks of accelerate move plain parameters only."""
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, dict):
            return
        places = {str(place) for place in device_map.values()}
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ModelError(
                f"device_map spreads the model over {', '.join(sorted(places))}: compressed weights cannot "
                "be offloaded to the CPU or the disk; use devices that hold the whole model"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        """Replace every sparse weight by a module of its parts, and check the files for them."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise ModelError("compressed weights cannot be loaded under a tensor-parallel plan")
        config = self.quantization_config
        weights = dict(model.named_parameters())
        tied = getattr(model, "all_tied_weights_keys", {})  # transformers 5: {copy: original}
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        transposed, int8 = set(config.transposed), set(getattr(config, "int8", ()))
        owners: dict[str, nn.Module] = {}
        described: dict[str, dict[str, Any]] = {}
        # What the files must hold: parts of an integer type or any float type; of biases, any tensor.
        expected: dict[str, nn.Parameter | None] = {}
        for stored, label in config.patterns.items():
            # A base model, loaded without its head, has shorter names.
            names = stored, stored.removeprefix(prefix), prefix + stored
            name = next((name for name in names if name in weights), None)
            if name is None:
                continue  # transformers reports it as unexpected
            if name in {*tied, *tied.values()}:
                raise CheckpointError(f"{name} is tied to another weight and cannot be sparse")
            if name in (known for known, *_ in self._loading):
                raise CheckpointError(f"quantization_config is damaged: it names {name} twice")
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            flip = stored in transposed
            fields = {
                "pattern": config.definitions.get(label),
                "label": label,
                "shape": list(weights[name].shape)[:: -1 if flip else 1],
                "transposed": flip,
            }
            dtype = weights[name].dtype
            if stored in int8:
                if dtype not in DTYPES:
                    raise ModelError(
                        f"{name} has int8 values, whose products are in float32, float16 or bfloat16; load "
                        f"the model with such a dtype, not {dtype}"
                    )
                fields |= {"values": VALUES, "dtype": str(dtype).removeprefix("torch.")}
            parts = _Parts(dtype, fields, name)
            self._orders.setdefault(owner, list(owner._parameters))
            delattr(owner, leaf)
            owner.add_module(leaf, parts)
            # No initial values: those functions expect a weight. What is missing is refused below.
            vars(owner)["_is_hf_initialized"] = vars(parts)["_is_hf_initialized"] = True
            self._loading.append((name, owner, leaf, fields))
            described[stored] = fields
            expected.update(parts.named_parameters(stored))
            owners[stored.rpartition(".")[0]] = owner
        if config.patterns and not self._loading:
            raise CheckpointError(
                f"quantization_config is of another model: {type(model).__name__} has no "
                f"{next(iter(config.patterns))!r:.80}"
            )
        for path, owner in owners.items():  # their biases
            expected.update({name: None for name, _ in owner.named_parameters(path, recurse=False)})
        if checkpoint_files is not None:
            _check_files(checkpoint_files, expected, described, set(config.patterns))
        return model

    # after --------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Make weights of the loaded parts; every index is checked."""
        for name, owner, leaf, fields in self._loading:
            parts = getattr(owner, leaf)
            kind: Any = class_of(fields)
            stored = (getattr(parts, part).detach() for part in kind.PARTS)
            weight = kind.from_stored(*stored, fields, name)
            put_parameter(owner, leaf, nn.Parameter(weight, requires_grad=False))
            # Back before its bias: the order of the state dict is that of the files.
            order = self._orders[owner]
            for later in order[order.index(leaf) + 1 :]:
                if later in owner._parameters:
                    owner._parameters[later] = owner._parameters.pop(later)
        self._loading.clear()
        self._orders.clear()
        model.is_quantized = False  # type: ignore[assignment]  # or .half() would be refused
        return model

    # saving and leaving -------------------------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """True: as safetensors only."""
        return safe_serialization is not False

    def get_state_dict_and_metadata(
        self, model: nn.Module, safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The plain tensors of a model, and the files' metadata; the model's config is updated."""
        ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        state = {
            name: part
            for name, part in unshared_state(model, tied_names(model)).items()
            if name not in ignored
        }
        tensors, description = flatten_state(state, checksums=True)
        if not _stored_as_named(model, tensors):
            raise ModelError(
                f"transformers would store the weights of {type(model).__name__} under other names than "
                "they have now; save the model with s3tensor.save_pretrained, or with "
                "save_original_format=False"
            )
        model.config.quantization_config = S3Config(**quantization(state))  # type: ignore[union-attr]
        return tensors, {METADATA_KEY: description}

    def dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Make the weights dense, in place; to transformers the model is then a plain one."""
        model = self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for found in model_weights(model):
            weight = found.parameter
            if isinstance(weight, Compressed):
                found.replace(nn.Parameter(weight.to_dense(dtype).contiguous()))
        return model

    @property
    def is_trainable(self) -> bool:
        """True: gradients pass through the frozen weights to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: a compressed weight is one operator of a graph."""
        return True


class _Parts(nn.Module):
    """A sparse weight while it loads: its parts, on the meta device."""

    def __init__(self, dtype: torch.dtype, fields: dict[str, Any], name: str) -> None:
        super().__init__()
        try:
            bound = Pattern.parse(fields["pattern"]).bind(tuple(fields["shape"]))
            kind: Any = class_of(fields)
            sizes = kind.part_sizes(bound, dtype)
        except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(
                f"quantization_config is damaged: pattern {fields['label']!r:.80} of {name} "
                f"({first_line(error)})"
            ) from None
        if max(math.prod(shape) for shape, _ in sizes.values()) >= 2**62:
            raise CheckpointError(
                f"quantization_config is damaged: {name} packs to {sizes['packed'][0]}"
            )
        for part, (shape, kept) in sizes.items():
            empty = torch.empty(shape, dtype=kept, device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        kind.from_stored(*self.parameters(), fields, name)  # checked before any file is read


def register() -> None:
    """Add the method to the tables of transformers, once.

    Raises:
        ModelError: a version of transformers that is too old.
    """
    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    numbers = transformers.__version__.split(".")[:2]
    if tuple(int(number) for number in numbers) < _OLDEST:
        raise ModelError(
            f"transformers {transformers.__version__} is too old; update it to 5.0 or later"
        )
    auto.register_quantization_config(METHOD)(S3Config)
    auto.register_quantizer(METHOD)(S3Quantizer)


def attach(model: nn.Module) -> nn.Module:
    """Make ``model.save_pretrained`` write a model's compressed weights; returns the model."""
    config = S3Config(**quantization(unshared_state(model, tied_names(model))))
    model.hf_quantizer = S3Quantizer(config)
    model.quantization_method = METHOD  # type: ignore[assignment]
    model.config.quantization_config = config  # type: ignore[union-attr]
    return model


def _check_files(
    files: list[str],
    expected: dict[str, nn.Parameter | None],
    described: dict[str, dict[str, Any]],
    named: set[str],
) -> None:
    """Raise CheckpointError unless the files hold what is expected; only their headers are read.

    Where they describe the sparse weights, under a checksum, the description must agree with the config: for
    those that are loaded (``described``), and with no others than the config names (``named``).
    """
    found: set[str] = set()
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise CheckpointError(f"{path}: compressed weights are read from safetensors only")
        with open_weights(path) as (file, description):
            if description is not None:
                _check_same(described, named, read_description(description, path), path)
            for name in expected.keys() & set(file.keys()):
                found.add(name)
                part, wanted = file.get_slice(name), expected[name]
                if wanted is None:
                    continue
                kind, needed = part.get_dtype(), _INTEGERS.get(wanted.dtype)
                fits = kind == needed if needed else kind in _FLOATS
                if tuple(part.get_shape()) != tuple(wanted.shape) or not fits:
                    raise CheckpointError(
                        f"{path}: {name} is {kind} of shape {part.get_shape()!s:.80}; its pattern needs "
                        f"{needed or 'a float type'} of shape {list(wanted.shape)}"
                    )
    missing = expected.keys() - found
    if missing:
        raise CheckpointError(f"{min(missing)!r} is missing from the model's files; get them again")


def _check_same(
    config: dict[str, dict[str, Any]], named: set[str], file: dict[str, Any], path: str
) -> None:
    unnamed = file.keys() - named
    if unnamed:  # transformers would give it random values
        raise CheckpointError(
            f"config.json has no pattern for {min(unnamed)!r:.80}, which {path} holds compressed; get "
            "config.json again, or save the model again"
        )
    for name, fields in config.items():
        found = file.get(name)
        same = isinstance(found, dict) and all(
            found.get(key) == fields.get(key)
            for key in ("shape", "transposed", "pattern", "values")
        )
        if not same:
            raise CheckpointError(
                f"config.json and {path} describe {name} differently; get them again"
            )


def _stored_as_named(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether transformers saves the tensors as they are: on loading it may have renamed or merged them."""
    from transformers.core_model_loading import revert_weight_conversion

    stored = revert_weight_conversion(model, dict(tensors))
    return stored.keys() == tensors.keys() and all(stored[n] is tensors[n] for n in tensors)


register()
