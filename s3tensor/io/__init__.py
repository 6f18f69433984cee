"""Models and state dicts in files: safetensors, Hugging Face folders, model cards."""
