"""What computes a step on a device: the model's form, its runner, its KV cache, and kernels for CPU and CUDA."""
