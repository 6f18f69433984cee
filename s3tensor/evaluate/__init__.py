"""Evaluate models: perplexity, tasks of lm_eval, and pruned against dense."""

from s3tensor.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
