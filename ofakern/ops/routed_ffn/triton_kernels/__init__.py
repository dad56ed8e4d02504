"""The Triton kernels of routed_linear; kernel_triton.py beside this folder launches them, once per expert.

products: rows found through an index times a weight (y, dx), and the product over an expert's tokens (dweight, dbias).
"""
