"""Masks: which weights a pattern keeps, and the packed format of the kept weights."""

from s3tensor.mask.projection import project, satisfies

__all__ = ["project", "satisfies"]
