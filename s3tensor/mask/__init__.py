"""Masks: which weights a pattern keeps, and how the kept ones are packed."""

from s3tensor.mask.projection import project, satisfies

__all__ = ["project", "satisfies"]
