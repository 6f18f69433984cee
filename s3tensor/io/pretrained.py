"""Hugging Face models: load, save compressed or dense, verify."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from s3tensor.errors import CheckpointError, ModelError
from s3tensor.files import first_line
from s3tensor.io.card import CARD, write_card
from s3tensor.io.folder import (
    OLD_WEIGHTS,
    compressed_files,
    quantization,
    read_json,
    shard_bytes,
    staging_folder,
    tied_names,
    unshared_state,
    write_files,
)
from s3tensor.io.folder import WEIGHTS as WEIGHTS
from s3tensor.io.state import load_state, without_shared_storage
from s3tensor.mask.projection import satisfies
from s3tensor.modes import neutral
from s3tensor.tensor.base import Compressed
from s3tensor.train.parametrized import trained_weights

_LAYERS = 1000  # a config with so many is tried, however few the tensors: layers may share them
_BUFFERS = 2**30  # bytes beyond those of the files that a new model may compute


@neutral()
def load_model(
    source: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, Any]:
    """A model and its tokenizer. The model's class is the one that ``config.json`` names, else a causal one.

    Args:
        source: a folder or hub name of a Hugging Face model, a ``.gguf`` file, or a folder that
            :func:`save_pretrained` wrote.
        dtype: of the weights, or its name; ``auto`` is that of the checkpoint, float32 for GGUF.
        device: of the model.

    Raises:
        ModelError: nothing can be loaded, or the class has no place for a tensor of the files, or they have
            none for a parameter of the class; the reason in one line.
    """

    path = _expanded(source)
    if compressed_files(path):
        wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype != "auto" and not isinstance(wanted, torch.dtype):
            raise ModelError(f"dtype={dtype!r:.40} is not a dtype of torch, nor 'auto'")
        model = from_pretrained(path, device)
        return model if dtype == "auto" else model.to(wanted), _tokenizer(path)
    names: dict[str, Any] = {}
    location: str | Path = source
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"no GGUF file at {path}")
        location, names = path.parent, {"gguf_file": path.name}
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is not the folder of a Hugging Face model: it has no config.json"
            )
        location = path
    elif path.exists():
        raise ModelError(f"{path} is a file; give a model's folder, a hub name or a .gguf file")
    elif str(source).startswith((".", "/", "~")) or str(source).endswith("/"):
        raise ModelError(f"no model at {source}")
    elif path.is_absolute() or len(path.parts) > 2:  # a hub name is NAME or OWNER/NAME
        raise ModelError(f"no model at {path}")
    with _quiet():
        try:
            wanted = torch.float32 if names and dtype == "auto" else dtype
            model, tokenizer = _dense_model(str(location), wanted, names)
        except ModelError:
            raise
        except (
            Exception
        ) as error:  # transformers raises many kinds; all mean that there is no model
            raise ModelError(f"cannot load a model from {source} ({first_line(error)})") from error
    _forget_gguf(model)
    return _on_device(model, device), tokenizer


def _dense_model(location: str, dtype: Any, names: dict[str, Any]) -> tuple[Any, Any]:
    """A dense model of the class that its config names, with all tensors of its files, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    kind = _named_class(AutoConfig.from_pretrained(location, **names)) or AutoModelForCausalLM
    takes = getattr(kind, "main_input_name", "input_ids")
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **names)
    except Exception as error:
        if takes == "input_ids":
            raise
        raise ModelError(
            f"{location} has no tokenizer that can be loaded: it is a {kind.__name__}, which takes {takes}, "
            "and models of token ids are what can be pruned and evaluated here"
        ) from error
    model, found = kind.from_pretrained(location, dtype=dtype, output_loading_info=True, **names)
    lost, absent = sorted(found["unexpected_keys"]), sorted(found["missing_keys"])
    if lost or absent:
        keys = lost or absent
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise ModelError(
            f"{location} as a {type(model).__name__} would "
            f"{'lose' if lost else 'start with random values for'} {keys[0]}{more}; name the class of the "
            "files in the architectures of config.json, or load the model with transformers and call "
            "s3tensor.llm.prune_model and s3tensor.save_pretrained"
        )
    dropped = _dropped(model, location)
    if dropped:
        more = f" and {len(dropped) - 1} more weights" if len(dropped) > 1 else ""
        warnings.warn(
            f"transformers leaves {dropped[0]}{more} of {location} out of a {type(model).__name__}; a model "
            "saved from it does not have them",
            stacklevel=4,  # the caller of load_model
        )
    return model, tokenizer


def _dropped(model: Any, location: str) -> list[str]:
    """Names of the weights in safetensors files that the model's class says to ignore, such as ``mtp.*``."""
    from huggingface_hub import try_to_load_from_cache

    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
    if not ignored:
        return []
    names: Iterable[str] = ()
    for file in (f"{WEIGHTS}.index.json", WEIGHTS):
        path: Any = Path(location) / file
        if not Path(location).is_dir():
            path = try_to_load_from_cache(location, file)
        if not isinstance(path, (str, Path)) or not Path(path).is_file():
            continue
        if file == WEIGHTS:
            with safe_open(path, "pt") as opened:
                names = opened.keys()
        else:
            names = read_json(Path(path)).get("weight_map", {})
        break
    here = model.state_dict().keys()
    pattern = re.compile("|".join(f"({each})" for each in ignored))
    return sorted(x for x in names if x.endswith("weight") and x not in here and pattern.search(x))


def _named_class(config: Any) -> Any:
    """The class that a config names, if transformers has it for such a config, else None."""
    import transformers

    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    kind: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known and isinstance(config, kind.config_class or ()) else None


@neutral()
def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    *,
    dense: bool = False,
    overwrite: bool = False,
    max_shard_size: int | str | None = "50GB",
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pruned model.

    Compressed (the default), ``model.safetensors`` holds packed values and packed indices, and
    ``config.json`` the patterns: :func:`from_pretrained` reads it, and so does transformers in a program
    that imports s3tensor. With ``dense=True`` the files are plain safetensors with zeros that any Hugging
    Face user can load without s3tensor.

    Args:
        model: a Hugging Face model, its sparse weights compressed, with or without int8 values, or dense
            with zeros.
        directory: created if missing.
        tokenizer: written beside the model when given.
        dense: write plain dense safetensors.
        overwrite: replace a model that is there; if that fails, it is still whole.
        max_shard_size: bytes, or a string such as ``"5GB"``, above which the weights are split; None for
            one file.
        card: what is known of the model, for a section of ``README.md``
            (:func:`s3tensor.io.card.write_card`); None writes no such file.

    Returns:
        The file of the weights, the index of several, or for ``dense=True`` the folder.

    Raises:
        CheckpointError: a model is there already, the folder cannot be written, or ``max_shard_size`` is not
            a size.
        ModelError: a model without a config, with parameters on the meta device, or still in training
            under S3Sparse.
    """
    folder = _expanded(directory)
    refuse_existing(folder, overwrite)
    largest = shard_bytes(max_shard_size)
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has no Hugging Face config; save its state_dict with "
            "s3tensor.io.state.save_state"
        )
    _forget_gguf(model)
    under = next((weight.path for weight in trained_weights(model)), None)
    if under is not None:
        raise ModelError(
            f"{under} is still under S3Sparse, and no reader of Hugging Face files knows its dense original; "
            "call s3tensor.finalize(model) first, or torch.save(model.state_dict()) to train on later"
        )
    state = unshared_state(model, tied_names(model))
    absent = [name for name, tensor in state.items() if tensor.is_meta]
    if absent:
        raise ModelError(f"{absent[0]} is on the meta device and has no values to save")
    try:
        with staging_folder(folder) as stage:
            if card is not None:
                if (folder / CARD).is_file():  # whose other sections stay
                    shutil.copyfile(folder / CARD, stage / CARD)
                write_card(stage, card, state, dense)
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
            if dense:
                whole = {name: densified(part).contiguous() for name, part in state.items()}
                plain = without_shared_storage(whole)
                with _quiet(), _config_as_stored(model, None):
                    model.save_pretrained(  # type: ignore[operator]
                        stage, state_dict=plain, max_shard_size=largest
                    )
                return folder
            with _config_as_stored(model, quantization(state)):
                config.save_pretrained(stage)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                generation.save_pretrained(stage)
            return folder / write_files(stage, state, largest)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write to {folder} ({first_line(error)}); free space or choose another folder"
        ) from error


@contextlib.contextmanager
def _config_as_stored(model: nn.Module, entry: dict[str, Any] | None) -> Iterator[None]:
    """While a model is written, its config says how it is stored: compressed, or plain."""
    config: Any = model.config
    quantizer, before = getattr(model, "hf_quantizer", None), vars(config).copy()
    config.architectures = [type(model).__name__]
    config.dtype = getattr(model, "dtype", None)  # what dtype="auto" will be
    vars(config).pop("quantization_config", None)
    if entry is not None:
        config.quantization_config = entry
    model.hf_quantizer = None  # type: ignore[assignment]
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)
        if quantizer is None:
            del model.hf_quantizer
        else:
            model.hf_quantizer = quantizer


@neutral()
def from_pretrained(directory: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The model that :func:`save_pretrained` wrote compressed, with compressed parameters.

    Its class is the one that ``config.json`` names, where transformers has it, else that of a causal
    language model. No code of the folder is run.

    Raises:
        CheckpointError: files that are missing, truncated, altered, or of another model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from s3tensor.io.transformers_quantizer import attach

    folder = _expanded(directory)
    files = compressed_files(folder)
    if not files:
        raise CheckpointError(
            f"{folder} holds no compressed model; give a folder that s3tensor.save_pretrained wrote, or "
            "load a dense model with transformers"
        )
    state = load_state(files)
    path = folder / "config.json"
    with _config_errors(path):
        _check_layers(read_json(path), max(len(state), _LAYERS))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        vars(config).pop("quantization_config", None)  # the files say the same, under a checksum
        # First without any memory: a config is trusted once it fits the files.
        with torch.device("meta"), _quiet():
            outline = _new_model(copy.deepcopy(config))
    _take_parameters(outline, state, folder)
    idle = sum(buffer.nbytes for buffer in outline.buffers() if buffer.is_meta)
    if idle > _BUFFERS + sum(file.stat().st_size for file in files):
        raise CheckpointError(
            f"{path} cannot be used (it asks for {idle} bytes that the files do not hold)"
        )
    # Parameters start on the meta device: no dense copy of them is ever made.
    with _config_errors(path), init_empty_weights(include_buffers=False), _quiet():
        model = _new_model(config)
    _take_parameters(model, state, folder)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return attach(_on_device(model, device))


@contextlib.contextmanager
def _config_errors(config: Path) -> Iterator[None]:
    """Raise CheckpointError where a config is used: transformers raises many kinds, all of one meaning."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{config} cannot be used ({first_line(error)})") from error


def _check_layers(config: dict[str, Any], most: int) -> None:
    """Raise ValueError for a number of layers, anywhere in the config, that the files cannot fill."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, most)
        elif re.search(r"layers?$", key) and isinstance(value, (int, float)) and value > most:
            raise ValueError(f"{key} is {value!r:.40}, more than the tensors of the files")


def _new_model(config: Any) -> Any:
    """A new model of the class that a config names, if transformers has it, else a causal one."""
    from transformers import AutoModelForCausalLM

    kind = _named_class(config)
    if kind is not None:
        return kind._from_config(config)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _take_parameters(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Make the tensors of a state dict the parameters of a model on the meta device.

    Raises:
        CheckpointError: the state of another model.
    """
    model.tie_weights()  # type: ignore[operator]
    model.requires_grad_(False)  # int8 values take no gradient
    try:
        found = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        odd = str(error).strip().splitlines()[-1].strip()  # the first line names only the class
        raise CheckpointError(f"{folder} does not fit its own config ({odd})") from error
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing or found.unexpected_keys:
        odd = (missing or found.unexpected_keys)[0]
        raise CheckpointError(
            f"{folder}: {odd!r} is {'missing from the file' if missing else 'unknown to the model'}"
        )
    model.requires_grad_(False)


@neutral()
def verify(source: nn.Module | str | Path) -> list[tuple[str, str, float]]:
    """Check that every sparse weight of a model, or of a saved folder, satisfies its pattern.

    Of a folder every checksum and every index is verified too.

    Returns:
        ``(name, pattern, density)`` for each sparse weight.

    Raises:
        CheckpointError: a damaged file, a weight that breaks its pattern, or NaN or Inf in any tensor.
    """
    if isinstance(source, nn.Module):
        state = dict(source.state_dict())
    else:
        path = _expanded(source)
        files = compressed_files(path) if path.is_dir() else []
        if path.is_dir() and not files:
            what = "a dense model" if _models_in(path) else "no model"
            raise CheckpointError(
                f"{path} holds {what}, without patterns and checksums to verify; give a folder that "
                "s3tensor.save_pretrained wrote compressed"
            )
        state = load_state(files or path)
    rows = []
    for name, tensor in state.items():
        sparse = isinstance(tensor, Compressed)
        if not bool(torch.isfinite(tensor.floats if sparse else tensor).all()):
            raise CheckpointError(f"{name} holds NaN or Inf")
        if sparse:
            dense = (tensor.t() if tensor.transposed else tensor).to_dense()
            if not satisfies(dense, tensor.pattern):
                raise CheckpointError(f"{name} does not satisfy {tensor.pattern}")
            rows.append((name, str(tensor.pattern), int(dense.count_nonzero()) / dense.numel()))
    return rows


def densified(tensor: Tensor) -> Tensor:
    """The tensor, unpacked when it is compressed."""
    return tensor.to_dense() if isinstance(tensor, Compressed) else tensor


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's weights in memory: ``(now, if all were dense)``. Tied weights count once."""
    now = dense = 0
    for tensor in unshared_state(model).values():
        whole = tensor.numel() * tensor.element_size()
        dense += whole
        now += tensor.nbytes_held if isinstance(tensor, Compressed) else whole
    return now, dense


def refuse_existing(
    folder: Path, overwrite: bool = False, remedy: str = "pass overwrite=True"
) -> None:
    """Raise CheckpointError when ``folder`` holds a model already and must not be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    present = _models_in(folder)
    if present and not overwrite:
        raise CheckpointError(
            f"{folder} holds a model already ({present[0].name}); nothing was overwritten: choose another "
            f"folder, or {remedy}"
        )


def _expanded(path: str | Path) -> Path:
    """A user's path; ``~`` is the home folder."""
    return Path(os.path.expanduser(path))


def _models_in(folder: Path) -> list[Path]:
    """Files of models in a folder."""
    names = (OLD_WEIGHTS, "config.json", "model*.safetensors", "pytorch_model*.bin", "*.gguf")
    return [path for name in names for path in sorted(folder.glob(name))]


def _on_device(model: nn.Module, device: torch.device | str) -> nn.Module:
    """The model on a device, for evaluation."""
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such device, or too little memory on it
        raise ModelError(f"cannot move the model to {device} ({first_line(error)})") from error


def _forget_gguf(model: nn.Module) -> None:
    """Mark a model that was dequantized from GGUF as plain: transformers would refuse to save it."""
    config = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    if (
        quantization is not None
        and "gguf" in str(getattr(quantization, "quant_method", "")).lower()
    ):
        del config.quantization_config  # type: ignore[union-attr]
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"{folder} has no tokenizer ({first_line(error)})") from error
    files = {"tokenizer.json", "tokenizer_config.json", *found.vocab_files_names.values()}
    if not any(
        (folder / name).exists() for name in files
    ):  # transformers 5.0 makes up an empty one
        raise CheckpointError(f"{folder} has no tokenizer (none of {', '.join(sorted(files))})")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; errors stay."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
