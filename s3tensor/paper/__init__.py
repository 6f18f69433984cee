"""The paper's own vocabulary, bound to parameters and in place (S3, arXiv 2604.11315, section 3).

A :class:`View` lays a parameter out, a :class:`BlockSpec` tiles the view, a :class:`ScopeSpec` tiles the
blocks, and couplings join blocks or scopes of several tensors. All of them read and write the parameters
through ``torch.as_strided``. They decide as :func:`s3tensor.project` does: both use
:mod:`s3tensor.mask.projection`, and :meth:`ScopeSpec.pattern` converts a spec to a pattern.
"""

from s3tensor.paper.block import BlockCoupling, Blocks, BlockSpec
from s3tensor.paper.builder import SparsityBuilder
from s3tensor.paper.scope import ScopeCoupling, Scopes, ScopeSpec
from s3tensor.paper.structured_obs import StructuredOBS
from s3tensor.paper.view import View

__all__ = [
    "BlockCoupling",
    "BlockSpec",
    "Blocks",
    "ScopeCoupling",
    "ScopeSpec",
    "Scopes",
    "SparsityBuilder",
    "StructuredOBS",
    "View",
]
