"""The LLaMA model, and its checkpoint format."""
