"""Blocks, scopes and couplings by name, in a chain of calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from s3tensor.errors import PatternError
from s3tensor.paper.block import BlockCoupling, Blocks, BlockSpec
from s3tensor.paper.scope import ScopeCoupling, Scopes, ScopeSpec
from s3tensor.paper.view import View

_Spec = TypeVar("_Spec", Blocks, Scopes)


class SparsityBuilder:
    """Blocks and scopes by name; each ``add_`` and ``couple_`` method returns the builder.

    Example:
        >>> import torch
        >>> up, down = torch.ones(6, 4), torch.ones(4, 6)
        >>> channels = (
        ...     SparsityBuilder()
        ...     .add_block(up, (1, -1), "up")
        ...     .add_block(down, (-1, 1), "down")
        ...     .couple_blocks(["up", "down"], [(0, 1), (1, 0)], "channel")
        ...     .add_scope("channel", (-1,), "mlp")
        ... )
        >>> channels.get_scope("mlp").numblk_per_scope()
        6

    Raises:
        PatternError: a name that is taken or unknown, or an error of the specs themselves.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Blocks] = {}
        self._scopes: dict[str, Scopes] = {}
        self._coupled: set[str] = set()  # scopes that are part of a coupling

    def add_block(
        self, param: Tensor | View, block_shape: Sequence[int], name: str
    ) -> SparsityBuilder:
        """A :class:`BlockSpec` over a parameter or a view."""
        return self._name(self._blocks, "block", name, BlockSpec(param, block_shape, name))

    def couple_blocks(
        self,
        block_names: Sequence[str],
        orders: Sequence[Sequence[int] | None] | None,
        name: str,
    ) -> SparsityBuilder:
        """A :class:`BlockCoupling` of named blocks."""
        blocks = [self.get_block(each) for each in block_names]
        return self._name(self._blocks, "block", name, BlockCoupling(blocks, orders, name))

    def get_block(self, name: str) -> Blocks:
        """The block or coupling of blocks of a name."""
        return _find(self._blocks, "block", name)

    def add_scope(self, block_name: str, scope_shape: Sequence[int], name: str) -> SparsityBuilder:
        """A :class:`ScopeSpec` over a named block or coupling of blocks."""
        scope = ScopeSpec(self.get_block(block_name), scope_shape, name)
        return self._name(self._scopes, "scope", name, scope)

    def couple_scopes(
        self,
        scope_names: Sequence[str],
        orders: Sequence[Sequence[int] | None] | None,
        name: str,
    ) -> SparsityBuilder:
        """A :class:`ScopeCoupling` of named scopes."""
        scopes = [self.get_scope(each) for each in scope_names]
        self._name(self._scopes, "scope", name, ScopeCoupling(scopes, orders, name))
        self._coupled.update(scope_names)
        return self

    def get_scope(self, name: str) -> Scopes:
        """The scope or coupling of scopes of a name."""
        return _find(self._scopes, "scope", name)

    def get_all_scopes(self) -> Iterator[Scopes]:
        """Every scope except those that are part of a coupling."""
        return (scope for name, scope in self._scopes.items() if name not in self._coupled)

    def _name(self, known: dict[str, _Spec], what: str, name: str, spec: _Spec) -> SparsityBuilder:
        if name in known:
            raise PatternError(f"{what} {name!r} is there already; choose another name")
        known[name] = spec
        return self


def _find(known: dict[str, _Spec], what: str, name: str) -> _Spec:
    if name not in known:
        names = ", ".join(map(repr, known)) or "none yet"
        raise PatternError(f"no {what} {name!r}; there are: {names}")
    return known[name]
