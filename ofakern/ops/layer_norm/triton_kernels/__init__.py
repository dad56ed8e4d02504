"""The Triton kernels of the fused LayerNorms; kernel_triton.py beside this folder launches them.

rows: a tile of rows, its statistics, its dropout. forward, backward: a kernel per op; tables: embeddings' gradients.
"""
