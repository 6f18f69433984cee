"""How good a model is: perplexity, tasks of lm_eval, and pruned beside dense."""

from s3tensor.evaluate.perplexity import perplexity

__all__ = ["perplexity"]
