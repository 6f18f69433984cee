"""What a pattern is: views, blocks and scopes, the algebra of layouts, and patterns by name.

Nothing here needs torch.
"""

from s3tensor.pattern.layout import Layout, coalesce, complement, composition, right_inverse
from s3tensor.pattern.pattern import BoundPattern, Pattern, bind, grammar, preset
from s3tensor.pattern.presets import vnm  # and all other presets are registered
from s3tensor.pattern.view_rule import ViewRule

__all__ = [
    "BoundPattern",
    "Layout",
    "Pattern",
    "ViewRule",
    "bind",
    "coalesce",
    "complement",
    "composition",
    "grammar",
    "preset",
    "right_inverse",
    "vnm",
]
