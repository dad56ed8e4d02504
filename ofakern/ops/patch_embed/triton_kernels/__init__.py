"""The Triton kernels of patch_embed; kernel_triton.py beside this folder launches them.

pixels: a tile of tokens and their pixels, wherever these lie. rows: the weight folded, then whole rows of tokens, or of
their gradient. gradients: what is summed over tokens.
"""
