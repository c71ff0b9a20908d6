"""What runs a model of each type: `mlx`, `gguf`, `huggingface` and `openai`."""
