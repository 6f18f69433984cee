"""The weights of a model that train under S3Sparse, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from s3tensor.errors import ModelError, NonFiniteError, PatternError
from s3tensor.model.weights import ModelWeight
from s3tensor.train.masked import Masked


@dataclass(frozen=True, kw_only=True)
class TrainedWeight(ModelWeight):
    """A weight under S3Sparse."""

    chain: Any  # ParametrizationList

    @property
    def sparse(self) -> Masked:
        last = self.chain[-1]
        assert isinstance(last, Masked)
        return last

    @property
    def transposed(self) -> bool:
        """As S3Sparse was told."""
        return bool(getattr(self.sparse, "transposed", False))

    @property
    def originals(self) -> tuple[Tensor, ...]:
        """What the chain starts from: usually one tensor, under ``weight_norm`` two."""
        if self.chain.is_tensor:
            return (self.chain.original,)
        return tuple(getattr(self.chain, f"original{i}") for i in range(self.chain.ntensors))

    @property
    def is_sharded(self) -> bool:
        """Whether the original is a DTensor, as FSDP2 keeps it between forwards."""
        return hasattr(self.originals[0], "full_tensor")

    def dense(self) -> Tensor:
        """The dense weight that S3Sparse is given: the original, or what earlier parametrizations make of it.

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


def trained_weights(module: nn.Module) -> Iterator[TrainedWeight]:
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
            yield TrainedWeight(path, owner, name, chain=chain)


def require_trained_weights(model: nn.Module) -> list[TrainedWeight]:
    """:func:`trained_weights`, at least one: a ModelError for a model without S3Sparse."""
    found = list(trained_weights(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no S3Sparse parametrization; call s3tensor.sparsify_training_ first "
            "(its report says which layers it skipped, and why)"
        )
    return found


def check_masks_not_shared(weights: Sequence[TrainedWeight]) -> None:
    """Refuse one S3Sparse on two weights where it holds the mask, or the scale, of one of them."""
    first: dict[int, TrainedWeight] = {}
    for weight in weights:
        sparse = weight.sparse
        other = first.setdefault(id(sparse), weight)
        held = sparse.mask is not None or getattr(sparse, "beta", None) is not None
        if held and other.originals[0] is not weight.originals[0]:
            raise ModelError(
                f"{other.path} and {weight.path} have one S3Sparse, which holds the mask of one of them; "
                "make an S3Sparse for each weight"
            )


@contextlib.contextmanager
def name_in_errors(weight: str, after: str = "") -> Iterator[None]:
    """Give an error about one weight the weight's name, and say after it what has not been done."""
    try:
        yield
    except (NonFiniteError, PatternError) as error:
        raise type(error)(f"{weight}: {error}{after}") from None
