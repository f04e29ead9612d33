"""Which sequences compute which tokens in a step, and in which blocks of the KV cache."""
