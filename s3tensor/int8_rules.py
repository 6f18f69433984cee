"""What operators do to an ``Int8SparseTensor`` beside those of :mod:`s3tensor.operator_rules`.

Nothing has a gradient, and the dtype is the one of products: the parts keep theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s3tensor import scaled
from s3tensor.compressed import refusal, rules_for
from s3tensor.int8 import Int8SparseTensor
from s3tensor.operator_rules import copy_parts

aten = torch.ops.aten
dispatch = rules_for(Int8SparseTensor.RULES)


@dispatch(aten._to_copy.default)
def _to_copy(func: Any, args: Any, kwargs: Any) -> Tensor:
    """On another device, or computed in another dtype: the integers and the scales stay what they are."""
    options = {key: value for key, value in kwargs.items() if key != "memory_format"}
    dtype = options.pop("dtype", None)
    if dtype is not None and dtype not in scaled.DTYPES:
        raise refusal(
            Int8SparseTensor, func, f"to {dtype}; products are in float32, float16 or bfloat16"
        )
    if options.pop("layout", None) not in (None, torch.strided):
        raise refusal(Int8SparseTensor, func, "to another layout")
    move = {key: value for key, value in options.items() if value is not None}
    made = args[0].map_parts(lambda part: func(part, **move), dtype=dtype)
    return made.in_order()  # of its new device and dtype


@dispatch(aten.copy_.default)
def _copy_(func: Any, args: Any, kwargs: Any) -> Any:
    if not all(isinstance(t, Int8SparseTensor) for t in args[:2]):
        raise refusal(
            Int8SparseTensor,
            func,
            "only weights of the same form are copied into each other; load the state dict with "
            "assign=True, or make a new weight with Int8SparseTensor.from_sparse",
        )
    return copy_parts(func, args, kwargs)
