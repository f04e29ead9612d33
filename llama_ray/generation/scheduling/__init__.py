"""What each step computes: sequences, their tokens, and their blocks of the KV cache."""
