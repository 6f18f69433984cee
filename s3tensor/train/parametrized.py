"""The weights of a model that train under S3Sparse, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError, NonFiniteError, PatternError
from s3tensor.train.masked import Masked


@dataclass(frozen=True)
class Site:
    """One weight under S3Sparse."""

    path: str  # of the weight in the model, such as "blocks.0.up.weight"
    owner: nn.Module
    name: str
    chain: Any  # ParametrizationList

    @property
    def sparse(self) -> Masked:
        last = self.chain[-1]
        assert isinstance(last, Masked)
        return last

    @property
    def originals(self) -> tuple[Tensor, ...]:
        """What the chain starts from: one tensor as a rule, two under ``weight_norm``."""
        if self.chain.is_tensor:
            return (self.chain.original,)
        return tuple(getattr(self.chain, f"original{i}") for i in range(self.chain.ntensors))

    @property
    def is_sharded(self) -> bool:
        """Whether the original is a DTensor, as FSDP2 keeps it between forwards."""
        return hasattr(self.originals[0], "full_tensor")

    def weight(self) -> Tensor:
        """The dense weight that S3Sparse is given: the original, or what comes of it before.

        Of a sharded original all ranks gather the whole, and its gradient for a function as score.
        """
        weight, *others = self.originals
        if self.is_sharded:
            gradient = weight.grad
            weight = weight.full_tensor()  # type: ignore[attr-defined]
            if gradient is not None and callable(getattr(self.sparse, "score", None)):
                weight.grad = gradient.full_tensor()  # type: ignore[attr-defined]
        for number, step in enumerate(list(self.chain)[:-1]):
            weight = step(weight, *others) if number == 0 else step(weight)
        return weight


def parametrized(module: nn.Module) -> Iterator[Site]:
    """Each weight whose last parametrization is an S3Sparse.

    Raises:
        PatternError: an S3Sparse that is not the last one.
    """
    for path, owner in list(module.named_modules()):
        if not parametrize.is_parametrized(owner):
            continue
        for name, chain in list(owner.parametrizations.items()):
            at = [isinstance(step, Masked) for step in chain]
            if not any(at):
                continue
            if sum(at) > 1:
                raise PatternError(
                    f"{type(owner).__name__}.{name} is under {sum(at)} S3Sparse; one weight has one pattern"
                )
            if not at[-1]:
                raise PatternError(
                    f"{type(owner).__name__}.{name} has parametrizations after S3Sparse; register "
                    "S3Sparse last, so that the weight in use satisfies its pattern"
                )
            yield Site(f"{path}.{name}" if path else name, owner, name, chain)


def check_alone(sites: Sequence[Site]) -> None:
    """Refuse one S3Sparse on two weights where it holds something of one of them."""
    first: dict[int, Site] = {}
    for site in sites:
        other = first.setdefault(id(site.sparse), site)
        held = site.sparse.mask is not None or getattr(site.sparse, "beta", None) is not None
        if held and other.originals[0] is not site.originals[0]:
            raise ModelError(
                f"{other.path} and {site.path} have one S3Sparse, which holds the mask of one of them; make "
                "an S3Sparse for each weight"
            )


@contextlib.contextmanager
def naming(weight: str, after: str = "") -> Iterator[None]:
    """Give an error about one weight the weight's name, and say after it what has not been done."""
    try:
        yield
    except (NonFiniteError, PatternError) as error:
        raise type(error)(f"{weight}: {error}{after}") from None
