"""A model for other programs: a Hugging Face directory, GGUF, the average of several models."""
