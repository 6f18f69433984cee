"""Triton kernels, installed as ``s3tensor.kernels``: ints and tensors in, tensors out.

A kernel file holds one kernel family and its launcher and imports nothing of s3tensor. Triton is
imported by the file that needs it, when a CUDA kernel first runs; ``s3tensor.ops`` is the only caller.
"""
