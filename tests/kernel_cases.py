"""Random packed weights, and kernels compiled for a GPU that need not be there."""

from __future__ import annotations

import re
from typing import Any

import torch
from hypothesis import strategies as st
from interpreter import assembled, gluon_source_of
from s3tensor.kernels import tiles
from torch import Tensor

from s3tensor.mask.packing import unpack
from s3tensor.pattern import Pattern

FORMS = tiles.FORMS
NIBBLES = torch.tensor([4, 8, 9, 12, 13, 14], dtype=torch.uint8)  # i0 | i1 << 2


def random_packed(
    form: str, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and codes of a random packed weight in canonical order, and the dense weight."""
    generator = torch.Generator(device).manual_seed(seed)
    bound = Pattern.parse(form).bind((rows, columns))
    values = torch.randn(bound.packed_shape, generator=generator, device=device).to(dtype)
    if form == "rowpair16":
        codes = torch.randint(0, 256, (bound.index_bytes,), generator=generator, device=device)
        codes = codes.to(torch.uint8)
        if bound.scopes % 8:
            codes[-1] &= (1 << bound.scopes % 8) - 1
    else:
        pick = torch.randint(0, 6, (2, bound.index_bytes), generator=generator, device=device)
        low, high = NIBBLES.to(device)[pick]
        codes = low | high << 4
        if bound.scopes % 2:
            codes[-1] &= 15
    return values, codes, unpack(values, codes, bound)


sizes = st.tuples(st.integers(1, 4).map(lambda n: 16 * n), st.integers(1, 5).map(lambda n: 64 * n))


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], arch: int) -> str:
    """SASS of a kernel for ``sm_<arch>``, after a check that nothing spills; needs no GPU."""
    warps = constants.pop("num_warps")
    names = kernel.arg_names
    signature = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    aligned = {"x_ptr", "v_ptr", "c_ptr", "y_ptr", "ws_ptr", "M"}
    aligned |= {name + n for name in ("v", "y") for n in ("2_ptr", "3_ptr")} | {"M2", "M3"}
    source = gluon_source_of(kernel, signature, constants, aligned)
    _, sass, usage = assembled(source, arch, warps)
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage
    return sass


def pointer_types(dtype: str, codes: str, x: str) -> dict[str, str]:
    return {
        "x_ptr": f"*{x}", "v_ptr": "*i32", "c_ptr": f"*{codes}", "b_ptr": f"*{dtype}",
        "y_ptr": f"*{dtype}", "ws_ptr": "*fp32", "cnt_ptr": "*i32",
    }  # fmt: skip
