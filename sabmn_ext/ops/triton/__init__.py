"""Triton kernels, one file of kernels and one of launches for each operation. Imported where dispatch chose them."""
