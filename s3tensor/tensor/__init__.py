"""Compressed tensors, and the operators that run on them."""

from s3tensor.tensor.base import Compressed
from s3tensor.tensor.int8 import Int8SparseTensor, rebuild_int8
from s3tensor.tensor.sparse import StructuredSparseTensor, rebuild

__all__ = ["Compressed", "Int8SparseTensor", "StructuredSparseTensor", "rebuild", "rebuild_int8"]
