"""The Triton kernels of the root-mean-square norm; kernel_triton.py beside this folder launches them."""
