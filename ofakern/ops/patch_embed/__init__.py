"""Patch embedding of images and videos in one pass; csrc/ops/patch_embed/README.md has the maths."""

from ofakern.ops.patch_embed.api import patch_embed

__all__ = ["patch_embed"]
