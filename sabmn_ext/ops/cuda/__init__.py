"""How the compiled CUDA kernels are called, one file per operation."""
