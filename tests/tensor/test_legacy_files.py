"""Files of torch's format before zip: contents follow the pickle, so that no check can have seen them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s3tensor.errors import CheckpointError
from s3tensor.tensor import Int8SparseTensor, StructuredSparseTensor


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:4"])
@pytest.mark.parametrize("int8", [False, True])
def test_a_weight_in_a_legacy_file_is_refused_whatever_memory_holds(
    tmp_path: Path, pattern: str, weights_only: bool, int8: bool
) -> None:
    weight: torch.Tensor = StructuredSparseTensor.from_dense(torch.randn(32, 64), pattern)
    weight = Int8SparseTensor.from_sparse(weight) if int8 else weight
    torch.save({"w": weight}, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="legacy format"):
        torch.load(tmp_path / "w.pt", weights_only=weights_only)
    torch.save({"w": weight}, tmp_path / "w.pt")
    assert torch.equal(torch.load(tmp_path / "w.pt", weights_only=weights_only)["w"], weight)
