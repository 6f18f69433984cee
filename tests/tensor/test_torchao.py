"""torchao's own tests of tensor subclasses, run on ours, and its quantization of what stays dense.

``TorchAOBasicTestCase`` and ``TorchAOCompileTestCase`` are taken whole, for a lossless pattern at
torchao's own threshold of 40 dB, for 2:4, and for rowpair16. What does not apply is overridden by a test
of what happens instead:

- ``test_device1_to_device2`` (its CPU case) calls ``.cuda()`` on any machine, which fails for every tensor
  where there is no CUDA. There, our version asserts that it is torch that refuses, and tests the rest.
- rowpair16: torchao's weights of (4, 128) have fewer rows than the 16 that the pattern pairs. The pattern
  runs with rows 2 apart instead of 8, which is the same code, and rowpair16 itself must refuse such a
  weight by name in every one of the tests.
- ``LINEAR_MIN_SQNR`` stands for the loss of a quantizer and is a field of the class. Random weights pruned
  by magnitude lose more, by a factor that is known (``expected_sqnr``); the 512 weights of a test scatter
  by less than 2 dB around it.

``TorchAOTensorParallelTestCase`` and ``TorchAOIntegrationTestCase`` take a torchao config instead of a
tensor, and slice weights; slicing a compressed weight is refused (tests/tensor/test_sparse.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import s3tensor as s3
from s3tensor import StructuredSparseTensor

pytest.importorskip("torchao", reason="needs torchao")
judges = pytest.importorskip("torchao.testing.utils", reason="needs torchao's test helpers")
quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")

# rowpair16 with rows 2 apart: 4 rows are a pair of pairs.
ROWPAIR = "view=(t h r) k -> t r h k; sizes=h:2,r:2; block=1,1,1,16; scope=1,1,2,1; keep=1"


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expected_sqnr(pattern: str) -> float:
    """Signal to noise of y = x W', in dB, when Gaussian W is pruned: weights to lost weights, in energy."""
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    lost = weight * ~s3.project(weight, pattern)
    return 10 * math.log10(float(weight.square().sum() / lost.square().sum()))


class Ours:
    """The fields that torchao's cases ask for."""

    TENSOR_SUBCLASS = StructuredSparseTensor
    FACTORY_FN = staticmethod(StructuredSparseTensor.from_dense)
    kwargs: ClassVar[dict[str, str]]


class Basic(Ours, judges.TorchAOBasicTestCase):
    __test__ = False

    def without_cuda(self) -> None:
        weight = self.FACTORY_FN(torch.randn(4, 128, dtype=torch.bfloat16), **self.kwargs)
        dense = weight.dequantize()
        for moved in (weight.to(device="cpu"), weight.to("cpu"), weight.cpu()):
            assert isinstance(moved, StructuredSparseTensor)
            assert torch.equal(moved.dequantize(), dense)
        for tensor in (weight, dense):
            # In torch's own words, for ours as for a plain tensor.
            with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
                tensor.cuda()

    if not torch.cuda.is_available():
        test_device1_to_device2_device1_cpu_device2_cpu = without_cuda


class Compile(Ours, judges.TorchAOCompileTestCase):
    __test__ = False


class TestBasicLossless(Basic):
    __test__ = True
    kwargs: ClassVar = {"pattern": "4:4"}  # torchao's 40 dB


class TestCompileLossless(Compile):
    __test__ = True
    kwargs: ClassVar = {"pattern": "4:4"}


class TestBasic24(Basic):
    __test__ = True
    kwargs: ClassVar = {"pattern": "2:4"}
    LINEAR_MIN_SQNR = expected_sqnr("2:4") - 2


class TestCompile24(Compile):
    __test__ = True
    kwargs: ClassVar = {"pattern": "2:4"}
    LINEAR_MIN_SQNR = expected_sqnr("2:4") - 2


class TestBasicRowPair(Basic):
    __test__ = True
    kwargs: ClassVar = {"pattern": ROWPAIR}
    LINEAR_MIN_SQNR = expected_sqnr(ROWPAIR) - 2


class TestCompileRowPair(Compile):
    __test__ = True
    kwargs: ClassVar = {"pattern": ROWPAIR}
    LINEAR_MIN_SQNR = expected_sqnr(ROWPAIR) - 2


def _cases() -> list[Any]:
    """Every test of torchao's two cases, as torchao wrote it, for rowpair16."""
    found = []
    for judge in (judges.TorchAOBasicTestCase, judges.TorchAOCompileTestCase):
        fields = {**vars(Ours), "kwargs": {"pattern": "rowpair16"}}
        case = type(f"RowPair16{judge.__name__}", (judge,), {**fields, "__test__": False})
        found += [
            pytest.param(case, name, id=f"{judge.__name__}.{name}")
            for name in sorted(dir(judge))
            if name.startswith("test_")
        ]
    return found


@pytest.mark.parametrize(("case", "name"), _cases())
def test_rowpair16_refuses_the_weights_of_torchao_by_name(case: Any, name: str) -> None:
    instance = case()
    with pytest.raises(s3.PatternError, match=r"rowpair16.*dim 0 has 4|dim 0 has 4.*rowpair16"):
        getattr(instance, name)()


# quantization of what stays dense ---------------------------------------------------------------------


def pruned_model() -> nn.Sequential:
    """Two linears, the first compressed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    compressed = StructuredSparseTensor.from_dense(model[0].weight, "2:4")
    model[0].weight = nn.Parameter(compressed, requires_grad=False)
    return model


def is_dense_linear(module: nn.Module, name: str) -> bool:
    """The filter of docs/interop.md."""
    return isinstance(module, nn.Linear) and not isinstance(module.weight, StructuredSparseTensor)


def int8() -> Any:
    return quantization.Int8WeightOnlyConfig(version=2)


def test_quantize_with_a_filter_leaves_compressed_linears_alone() -> None:
    model = pruned_model()
    reference = copy.deepcopy(model)
    quantization.quantize_(model, int8(), filter_fn=is_dense_linear)
    assert isinstance(model[0].weight, StructuredSparseTensor)
    assert torch.equal(model[0].weight, reference[0].weight)
    quantized: Tensor = model[2].weight
    assert type(quantized).__module__.startswith("torchao")
    x = torch.randn(5, 64)
    # Rounding to 127 steps of a row's largest weight: off by half a step for each of 32 inputs at most.
    step = reference[2].weight.abs().amax(1) / 127
    hidden = reference[:2](x)
    allowed = hidden.abs().sum(1, keepdim=True) * step * 0.51
    assert bool(((model(x) - reference(x)).abs() <= allowed).all())


def test_a_pruned_and_quantized_model_compiles_whole() -> None:
    model = pruned_model()
    quantization.quantize_(model, int8(), filter_fn=is_dense_linear)
    x = torch.randn(5, 64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(compiled, model(x))


def test_quantize_without_a_filter_refuses_a_compressed_linear_and_keeps_it() -> None:
    model = pruned_model()
    before = model[0].weight
    with pytest.raises(s3.UnsupportedOpError, match=r"StructuredSparseTensor.*to_dense\(\)"):
        quantization.quantize_(model, int8())
    assert model[0].weight is before


def test_a_quantized_weight_is_compressed_after_it_is_dequantized_and_not_before() -> None:
    model = pruned_model()
    quantization.quantize_(model, int8(), filter_fn=is_dense_linear)
    with pytest.raises(s3.PatternError, match=r"Int8Tensor.*dequantize\(\)"):
        StructuredSparseTensor.from_dense(model[2].weight, "2:4")
    dense = model[2].weight.dequantize()
    compressed = StructuredSparseTensor.from_dense(dense, "2:4")
    assert torch.equal(compressed.to_dense(), dense * compressed.mask())
