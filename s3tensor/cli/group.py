"""The command ``s3tensor``: exit codes, argument types, and what its commands share."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from s3tensor.errors import CheckpointError, S3Error
from s3tensor.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    ParamType = click.ParamType[Any]  # generic in the stubs of click 8.2 and later only
else:
    ParamType = click.ParamType

DTYPES = ("auto", "float32", "bfloat16", "float16")

out = Console(soft_wrap=True, markup=False, highlight=False)
err = Console(soft_wrap=True, markup=False, highlight=False, stderr=True)


class Refused(click.ClickException):
    """Wrong usage, in one line."""

    exit_code = 2


class Group(click.Group):
    """A group whose commands report errors as one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2 and later
                raise
            command = error.ctx.command_path if error.ctx else ctx.command_path
            message = error.format_message().rstrip(".")
            hint = "" if "\n" in message else f" (see {command} --help)"
            raise Refused(message + hint) from error
        except S3Error as error:
            raise click.ClickException(str(error)) from error
        except ImportError as error:  # of an optional package
            raise click.ClickException(f"{error}; pip install 's3tensor[all]'") from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            raise click.ClickException(str(error)) from error
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":
                raise
            first = str(error).splitlines()[0]
            raise click.ClickException(f"{first} Use fewer or shorter sequences") from error
        except KeyboardInterrupt:
            err.print("\nstopped")
            raise SystemExit(130) from None


class _PatternType(ParamType):
    """A pattern by its string."""

    name = "pattern"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Pattern:
        try:
            return Pattern.parse(value)
        except S3Error as error:
            self.fail(str(error), param, ctx)


class _ShapeType(ParamType):
    """A weight's shape, such as 16x64."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(n) for n in str(value).lower().split("x"))
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r} is not ROWSxCOLUMNS, such as 16x64", param, ctx)
        return sizes


class _DeviceType(ParamType):
    """An available device."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        import torch

        try:
            found = torch.empty(1, device=value)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            self.fail(f"{value!r} cannot be used ({str(error).splitlines()[0]})", param, ctx)
        if found.is_meta:
            self.fail(
                f"{value!r} cannot be used (it holds no values); give cpu or cuda", param, ctx
            )
        return str(value)


class _ShareType(ParamType):
    """A number, or the word auto."""

    name = "number or auto"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        if value == "auto":
            return "auto"
        try:
            return float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor auto", param, ctx)


PATTERN, SHAPE, DEVICE, SHARE = _PatternType(), _ShapeType(), _DeviceType(), _ShareType()
COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**63 - 1)


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Read defaults from a YAML file: a mapping for each command, options by their long names."""
    if path is None:
        return
    try:
        document = read_yaml(path) or {}
    except ValueError as error:
        raise Refused(str(error)) from None
    if not isinstance(document, dict):
        raise Refused(f"{path} must map commands to their options, as in prune: {{samples: 64}}")
    commands = main.commands
    defaults: dict[str, dict[str, Any]] = {}
    for command, options in document.items():
        if command not in commands:
            raise Refused(
                f"{path}: no command {command!r}; there are {', '.join(sorted(commands))}"
            )
        known = {
            name.lstrip("-").replace("_", "-"): param
            for param in commands[command].params
            for name in (*param.opts, *param.secondary_opts)
            if isinstance(param, click.Option)
        }
        if not isinstance(options, dict):
            raise Refused(f"{path}: {command} must map options to values")
        defaults[command] = {}
        for option, value in options.items():
            param = known.get(str(option).replace("_", "-"))
            if param is None:
                raise Refused(
                    f"{path}: {command} has no option {option!r}; it has {', '.join(sorted(known))}"
                )
            single = param.multiple and value is not None and not isinstance(value, list)
            defaults[command][str(param.name)] = [value] if single else value
    ctx.default_map = defaults


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file; 2:4 is a string, not 124 (base 60 in YAML 1.1).

    Raises:
        ValueError: a file that is not YAML, in one line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)
            plain = kind is yaml.ScalarNode and ":" in value
            number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            return self.DEFAULT_SCALAR_TAG if plain and number else tag

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


@click.group(
    name="s3tensor",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""Examples:

\b
  s3tensor show 2:4
  s3tensor prune HuggingFaceTB/SmolLM2-135M --pattern 2:4 --out sparse
  s3tensor verify sparse
  s3tensor eval sparse
  s3tensor compare HuggingFaceTB/SmolLM2-135M sparse
  s3tensor --config run.yaml prune HuggingFaceTB/SmolLM2-135M --out sparse

A configuration file sets defaults; the command line overrides them:

\b
  prune:
    pattern: rowpair16
    samples: 64

Completion in bash: eval "$(_S3TENSOR_COMPLETE=bash_source s3tensor)"; zsh and fish likewise.""",
)
@click.version_option(package_name="s3tensor")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    callback=_read_config,
    is_eager=True,
    expose_value=False,
    help="YAML file with defaults for the options of commands",
)
def main() -> None:
    """Structured sparsity for PyTorch: prune, compress, evaluate, compare and draw."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Report errors of s3tensor as wrong usage."""
    try:
        yield
    except S3Error as error:
        raise Refused(str(error)) from error


def load(model: str, dtype: str) -> tuple[Any, Any]:
    import torch

    from s3tensor.io import pretrained as hf

    with err.status(f"loading {model}") if err.is_terminal else contextlib.nullcontext():
        return hf.load_model(model, "auto" if dtype == "auto" else getattr(torch, dtype))


def perplexity_on(
    model: Any, tokens: Tensor | None, seq_len: int, device: str, title: str
) -> float | None:
    if tokens is None:
        return None
    from s3tensor.evaluate.perplexity import perplexity

    home = next(model.parameters()).device
    model.to(device)
    try:
        with bar(title) as advance:
            return perplexity(model, tokens, seq_len, progress=advance)
    finally:
        model.to(home)


@contextlib.contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    bar = Progress(console=err, disable=not err.is_terminal, transient=True)
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_writable(path: Path) -> None:
    """Refuse up front a file that could not be written at the end."""
    from s3tensor.files import is_special

    if is_special(path):
        if not os.access(path, os.W_OK):
            raise CheckpointError(f"cannot write {path}: permission denied")
        return
    folder = next(p for p in Path(os.path.realpath(path)).parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise CheckpointError(f"cannot write {path}: {folder} is not a writable folder")


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
