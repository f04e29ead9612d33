"""Generation on CUDA: kernels in Triton, a paged cache that they read, and decoding in CUDA graphs."""
