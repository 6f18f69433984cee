"""Training under a pattern: S3Sparse, its schedules and masks, and what makes the result compressed."""
