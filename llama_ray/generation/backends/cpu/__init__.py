"""Generation on a CPU: kernels in C++, compiled on first use, and the layers and the cache that use them."""
