"""The errors of s3tensor. Each message names the rule, the value that broke it and the remedy."""

from __future__ import annotations


class S3Error(Exception):
    """Base of every error that s3tensor raises on purpose."""


class PatternError(S3Error, ValueError):
    """A pattern is malformed, or does not fit the tensor that it is given."""


class NonFiniteError(S3Error, ValueError):
    """NaN or Inf in a weight, an activation or a Hessian."""


class OptionError(S3Error, ValueError):
    """An option of a function that is unknown, out of its range, or at odds with another."""


class ArgumentError(OptionError, TypeError):
    """An option that a function does not take or lacks, or the wrong type of one: a TypeError too."""


class PrunerError(OptionError):
    """A pruner that is unknown, or an option of one that is out of its range."""


class HessianError(S3Error, ValueError):
    """A Hessian of the wrong size, not symmetric, or not positive."""


class NonFiniteHessianError(HessianError, NonFiniteError):
    """NaN or Inf in a Hessian: caught as either of its bases."""


class CalibrationError(S3Error, ValueError):
    """Calibration or evaluation data that cannot be used: too short, empty, of the wrong type."""


class ModelError(S3Error, ValueError):
    """A model in which s3tensor finds nothing to prune, or not what a checkpoint describes."""


class CheckpointError(S3Error, RuntimeError):
    """A checkpoint that is missing, truncated, altered, or in the way of a new one."""


class UnsupportedOpError(S3Error, NotImplementedError):
    """An operator that has no rule for a compressed tensor; nothing densifies in silence."""
