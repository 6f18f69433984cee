"""Triton kernels, installed as ``s3tensor.kernels``: ints and tensors in, tensors out.

A kernel file holds one kernel family and its launcher and imports nothing of s3tensor. Triton is
imported by the file that needs it, when a CUDA kernel first runs. The callers, ``s3tensor.ops``, ``mask``,
``selection`` and ``packing``, import a file inside the function that runs its kernel.

``tiles``   the order of values and codes that the matmul kernels read fastest; torch only
``matmul``  ``linear`` of 1 to 128 rows by a packed weight: checks, the choice of a kernel, scratch memory
``skinny``  its kernel for few rows, from sm_80 on
``wide``    its kernel for 17 rows and more, on sm_90
``expand``  what both share: packed words to tensor-core fragments, and sums in a fixed order
``select``  order statistics and top-k masks of rows, which stay in registers; longer rows a byte a pass
``masks``   projections onto N:M and its relatives: one read of the weight, one write of the mask; Triton 3.3

The matmul kernels are Gluon: they need Triton 3.6 or later, and importing ``matmul`` without it raises
ImportError. They were compiled with 3.6, 3.7 and 3.9 and run with 3.6.
"""
