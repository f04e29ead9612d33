"""What a LLaMA is, and its checkpoint format."""
