"""Generation on CUDA: Triton kernels, a paged cache, and decoding in CUDA graphs."""
