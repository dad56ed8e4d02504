"""Layers built on the ops: attention on packed tokens, NormFormer layers, relative-position blocks, losses."""
