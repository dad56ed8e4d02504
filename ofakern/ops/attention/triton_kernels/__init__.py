"""The Triton kernels of attention. kernel_triton.py beside this folder launches them; README.md has the formula.

plan: which rows and keys a program owns. tiles: one tile of scores, its masks, its dropout. forward, backward, tables:
the kernels. Triton reads these functions' source, so they are untyped and know constants only as `tl.constexpr`.
"""
