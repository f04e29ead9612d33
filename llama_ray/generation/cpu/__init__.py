"""The generation engine on a CPU: kernels in C++, compiled on first use, and what of the engine is made of them."""
