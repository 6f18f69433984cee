"""A whole model in memory: its weights compressed, quantized, and the channels that it can lose."""
