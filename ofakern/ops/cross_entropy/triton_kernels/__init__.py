"""The Triton kernels of cross_entropy; kernel_triton.py beside this folder launches them.

tiles: a tile of scores, and which of them count. losses: what a run of ids leaves per token, and its merge. gradient:
the gradient of the scores of a chunk of tokens, which torch multiplies with weight and hidden.
"""
