"""Triton kernels, installed as ``s3tensor.kernels``: ints and tensors in, tensors out.

A kernel file holds one family of kernels and its launcher and imports nothing of s3tensor. The rest of
s3tensor loads a file through ``s3tensor.mask.backend`` when its kernel first runs; the file imports Triton.

================  ======================================================================================
``tiles``         the order of values and codes that the matmul kernels read fastest; torch only
``matmul``        ``linear`` of 1 to 128 rows by a packed weight of the four forms that have a tile order:
                  checks, the choice of a kernel, scratch memory
``skinny``        its kernel for few rows, from sm_80 on (Gluon)
``wide``          its kernel for 17 rows and more, on sm_90 (Gluon)
``expand``        shared by both: packed words to tensor-core fragments, and sums in a fixed order
``widen``         the same for int8 values, for ``skinny``
``launch``        launches, and those that were recorded, again
``gpu``           whether the matmul kernels run on a device, and how large it is
``columns``       ``linear`` of 1 to 64 rows by any N:M of columns; its kernels are
``gather``        plain multiply-adds, any dtype
``runs``          tensor cores, 16-bit floats and the common N:M (Gluon)
``blocks``        ``linear`` of 1 to 64 rows by rows of blocks
``unpack``        packed to dense
``pack``          dense to packed
``select``        order statistics and top-k masks of rows, which stay in registers
``masks``         projections onto N:M and its relatives: one read of the weight, one write of the mask
``masked``        the weight in use under N:4: choose the mask, apply it and shrink the rest, in one pass
``transposable``  the best mask of each 4x4 tile whose rows and columns keep N
``cores``         from a dense 2:4 weight to cuSPARSELt's compressed form
================  ======================================================================================

Gluon needs Triton 3.6 or later; importing ``matmul`` without it raises ImportError. Plain Triton kernels
compile from 3.2 on, ``masks`` and ``masked`` from 3.3 on, ``columns`` and ``blocks`` from 3.5 on.
"""
