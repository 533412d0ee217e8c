"""How the C++ CPU kernels are called, one file per operation."""
