"""Text to calibrate and evaluate with: where it comes from, and its tokens."""
