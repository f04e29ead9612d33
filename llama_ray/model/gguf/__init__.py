"""LLaMA checkpoints in GGUF, the file format of llama.cpp."""
