"""The errors of s3tensor. Each message names the rule, the value that broke it and the remedy."""

from __future__ import annotations


class S3Error(Exception):
    """Base of the errors that s3tensor raises on purpose, besides ``TypeError`` for what has a wrong type."""


class PatternError(S3Error, ValueError):
    """A pattern is malformed, or does not fit the tensor that it is given."""


class NonFiniteError(S3Error, ValueError):
    """NaN or Inf in a weight, an activation or a Hessian."""


class OptionError(S3Error, ValueError):
    """An option that is unknown, out of range, or at odds with another or with a mode of torch."""


class ArgumentError(OptionError, TypeError):
    """An option that a function does not take or lacks, or the wrong type of one: a TypeError too."""


class PrunerError(OptionError):
    """An unknown pruner, or an option of one that is unknown or out of range."""


class HessianError(S3Error, ValueError):
    """A Hessian of the wrong size, not symmetric, or not positive."""


class NonFiniteHessianError(HessianError, NonFiniteError):
    """NaN or Inf in a Hessian; ``except`` catches it as either of its bases."""


class CalibrationError(S3Error, ValueError):
    """Calibration or evaluation data that cannot be used: too short, empty, of the wrong type."""


class ModelError(S3Error, ValueError):
    """A model that has nothing to prune, or that is not what a checkpoint describes."""


class CheckpointError(S3Error, RuntimeError):
    """A checkpoint that is missing, truncated or altered, or that would be overwritten."""


class UnsupportedOpError(S3Error, NotImplementedError):
    """An operator that has no rule for a compressed tensor: it raises rather than densify silently."""
