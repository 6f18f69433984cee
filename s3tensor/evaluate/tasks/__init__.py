"""Tasks of lm_eval that need no network: YAML files, and the functions that make their documents."""
