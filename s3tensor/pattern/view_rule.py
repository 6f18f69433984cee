"""View rules in einops words: how a weight's dims are split and permuted, before any size is known."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from s3tensor.errors import PatternError
from s3tensor.pattern.layout import Layout

LONGEST = (
    1000  # characters of a pattern's string, so that a hostile one costs neither time nor output
)
_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class ViewRule:
    """A parsed view rule in einops words, for example ``m (t h p) -> m t p h``.

    ``inputs`` holds one group of axis names for each dim of the weight, slowest first inside a group;
    ``outputs`` one axis name for each dim of the view.
    """

    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> ViewRule:
        """Parse and check a rule; both sides must name the same axes, each once.

        Raises:
            PatternError: naming what does not parse.
        """
        if not isinstance(text, str) or len(text) > LONGEST:
            raise PatternError(
                f"a view rule is a string of at most {LONGEST} characters, as in 'm (t p) -> m p t', "
                f"got {text!r:.80}"
            )
        sides = text.split("->")
        if len(sides) != 2:
            raise PatternError(
                f"view rule {text!r} needs exactly one '->', as in 'm (t p) -> m p t'"
            )
        inputs = _groups(sides[0], text)
        outputs = _groups(sides[1], text)
        if any(len(group) != 1 for group in outputs):
            raise PatternError(
                f"view rule {text!r} groups axes on its right side; give every axis a dim of its own "
                "and let block or scope span several dims"
            )
        left = [name for group in inputs for name in group]
        right = [group[0] for group in outputs]
        for side, names in (("left", left), ("right", right)):
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise PatternError(f"view rule {text!r} repeats {repeated[0]!r} on its {side} side")
        if set(left) != set(right):
            odd = sorted(set(left) ^ set(right))
            raise PatternError(f"view rule {text!r} must name {odd[0]!r} on both sides")
        return cls(inputs, tuple(right))

    @classmethod
    def identity(cls, ndim: int) -> ViewRule:
        """The rule that keeps every dim as it is."""
        names = tuple(f"d{dim}" for dim in range(ndim))
        return cls(tuple((name,) for name in names), names)

    def layout(self, sizes: Mapping[str, int], strides: Sequence[int]) -> Layout:
        """The view of a tensor: its axes in the order of the right side.

        Args:
            sizes: of every axis.
            strides: of the tensor's dims.
        """
        modes: dict[str, tuple[int, int]] = {}
        for group, stride in zip(self.inputs, strides, strict=True):
            for name in reversed(group):
                modes[name] = (sizes[name], stride)
                stride *= sizes[name]
        shape, stride_of = zip(*(modes[name] for name in self.outputs), strict=True)
        return Layout(shape, stride_of)

    def then(
        self, second: ViewRule, sizes: Mapping[str, int], second_sizes: Mapping[str, int]
    ) -> tuple[ViewRule, dict[str, int]]:
        """One rule for this one followed by ``second`` on its view, and the sizes of its axes.

        Each axis of this rule's view is a dim of ``second``, and where ``second`` splits it, its axes
        replace it.

        Args:
            second: the rule on the view of this one.
            sizes: the given sizes of this rule's axes.
            second_sizes: the given sizes of the second rule's axes.

        Raises:
            PatternError: when the dims or the sizes of the two do not match.
        """
        if len(second.inputs) != len(self.outputs):
            raise PatternError(
                f"its view has {len(self.outputs)} dims, not the {len(second.inputs)} that are wanted"
            )
        taken = {name for group in self.inputs for name in group}
        split: dict[str, tuple[str, ...]] = {}  # what an axis of this rule becomes
        names: dict[str, str] = {}  # an axis of the second rule, in the merged one
        merged: dict[str, int] = {}
        for axis, group in zip(self.outputs, second.inputs, strict=True):
            for name in group:
                names[name] = axis if len(group) == 1 else _unused(f"{axis}_{name}", taken)
                taken.add(names[name])
            split[axis] = tuple(names[name] for name in group)
            given = {name: second_sizes[name] for name in group if name in second_sizes}
            whole, product = sizes.get(axis), math.prod(given.values())
            if whole is not None:
                unknown = [name for name in group if name not in given]
                if whole % product or (not unknown and whole != product):
                    sizes_given = " x ".join(map(str, given.values()))
                    raise PatternError(
                        f"axis {axis!r} has size {whole}, which is not split by {sizes_given}"
                    )
                given |= dict.fromkeys(unknown, whole // product)
            merged |= {names[name]: size for name, size in given.items()}
        inputs = tuple(
            tuple(name for axis in group for name in split[axis]) for group in self.inputs
        )
        return ViewRule(inputs, tuple(names[name] for name in second.outputs)), merged

    def __str__(self) -> str:
        left = " ".join(
            group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.inputs
        )
        return f"{left} -> {' '.join(self.outputs)}"


def _groups(side: str, text: str) -> tuple[tuple[str, ...], ...]:
    """Split one side of a view rule into groups of axis names."""
    groups: list[tuple[str, ...]] = []
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", side)
    for token in tokens:
        names = tuple(token[1:-1].split()) if token.startswith("(") and len(token) > 1 else (token,)
        bad = [name for name in names if not _AXIS.fullmatch(name)]
        if bad or not names:
            raise PatternError(
                f"view rule {text!r} has {(bad or [token])[0]!r}; use axis names such as 'm', grouped "
                "once with balanced parentheses such as '(t p)'"
            )
        groups.append(names)
    if not groups:
        raise PatternError(f"view rule {text!r} has an empty side; write for example 'm k -> m k'")
    return tuple(groups)


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name
