"""Where kernels run: in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
from interpreter import DEVICES, device_of


@pytest.fixture(params=DEVICES, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    return device_of(request.param)
