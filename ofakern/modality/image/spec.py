"""IMAGE: pixels in the source; as a target, the codes of an image tokenizer."""

from __future__ import annotations

from ofakern.instruction import Modality
from ofakern.modality.spec import SOURCE, TARGET, AdaptorSpec, AttributeSpec, ModalitySpec, PreprocessorSpec, attributes

__all__ = ["SPEC"]

_PIXEL_ADAPTORS = ("image_resnet", "image_vit", "image_patch_embed")
_ATTRIBUTES = attributes(
    AttributeSpec("mask_ratio", "float", "blank the centre square of this share of the side", minimum=0, maximum=1),
)
_NO_AUGMENTATION = "its random training augmentation is not available yet"

SPEC = ModalitySpec(
    modality=Modality.IMAGE,
    preprocessors={
        "image": PreprocessorSpec("image", _PIXEL_ADAPTORS, _ATTRIBUTES, sides=SOURCE),
        "imagenet": PreprocessorSpec(
            "imagenet", _PIXEL_ADAPTORS, _ATTRIBUTES, sides=SOURCE, available=False, note=_NO_AUGMENTATION
        ),
        "imagepretrain": PreprocessorSpec(
            "imagepretrain", _PIXEL_ADAPTORS, _ATTRIBUTES, sides=SOURCE, available=False, note=_NO_AUGMENTATION
        ),
        "image_vqgan": PreprocessorSpec(
            "image_vqgan",
            ("image_vqgan",),
            attributes(AttributeSpec("length", "int", "keep this many codes", minimum=1)),
            sides=TARGET,
            generator="image_codes",
            postprocess="image",
        ),
    },
    adaptors={
        "image_resnet": AdaptorSpec("image_resnet", sides=SOURCE),
        "image_vit": AdaptorSpec("image_vit", sides=SOURCE),
        "image_patch_embed": AdaptorSpec("image_patch_embed", sides=SOURCE),
        "image_vqgan": AdaptorSpec("image_vqgan", sides=TARGET),
    },
    default_preprocessor="image",
    default_adaptor="image_resnet",
    default_target_preprocessor="image_vqgan",
)
