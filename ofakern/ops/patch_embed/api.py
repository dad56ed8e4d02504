"""The public door of `patch_embed`: every argument is checked here. The room's other half: csrc/ops/patch_embed/."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ofakern.errors import OfakernError, OfakernTypeError, OfakernValueError
from ofakern.ops import log
from ofakern.ops.library import STRAIGHT, autocast, straight
from ofakern.ops.patch_embed import op
from ofakern.ops.patch_embed.reference import patch_embed_reference

_WHERE = "patch_embed"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PIXELS = (torch.uint8, *_FLOATS)
# Where the letters t, c, h, w of a layout stand; without t, one frame.
_LAYOUTS = {4: ("chw", "hwc"), 5: ("cthw", "tchw", "thwc")}
_logger = logging.getLogger("ofakern.ops.patch_embed")


class _Call(NamedTuple):
    """Checked arguments, as op.run and the reference take them."""

    images: list[Tensor]
    weight: Tensor
    scale: list[float]
    shift: list[float]
    bias: Tensor | None
    type_embedding: Tensor | None
    position: Tensor | None
    position_index: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    eps: float


def patch_embed(
    images: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    type_embedding: Tensor | None = None,
    position: Tensor | None = None,
    position_index: Tensor | None = None,
    ln_weight: Tensor | None = None,
    ln_bias: Tensor | None = None,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Tokens of images or videos: normalise, cut into patches, project, add embeddings, LayerNorm, in one pass.

    ::

        y[t]   = bias + type_embedding + position[p(t)] + weight . ((pixels of patch t - mean) / std)
        out[t] = LayerNorm(y[t])                                      (y[t] without ln_weight)

    Pixels of uint8 are divided by 255 first; mean and std are folded into the weight, so that no float image exists.

    Args:
        images: a batch `[n, *layout]`, or a sequence of images `layout` of any sizes that are multiples of the patch.
            uint8, or float32, bfloat16, float16 (float64 on the reference).
        weight: `[D,C,ph,pw]` as of a Conv2d whose stride is its kernel, or `[D,C,kt,ph,pw]` of a Conv3d (tubelets of kt
            frames). float32, bfloat16, float16 (float64 on the reference): the dtype of the tokens.
        bias: `[D]`, as are type_embedding, ln_weight and ln_bias; used in float32.
        layout: "chw" (default) or "hwc"; with a Conv3d weight "cthw" (default), "tchw" or "thwc".
        mean, std: C numbers, of pixels in [0, 1] for uint8, else of the images' own; 0 and 1 when None.
        position: `[P,D]`, added by p(t): position_index (int32 `[N]`, each in [0,P)), else the patch's number inside
            its image, row-major over frames, rows, columns.
        ln_weight, ln_bias: both or neither.
        eps: added to the variance.
        backend: "auto", "cpu", "cuda", "triton" or "reference" (plain torch). Never falls back.

    Returns:
        `[N,D]` in weight's dtype: the images in order, no padding, patches row-major.

    Differentiable in weight, bias, type_embedding, position, ln_weight and ln_bias; in float images on the reference
    only. The backward pass computes y again: nothing but the arguments is kept. Under autocast weight and position take
    the autocast dtype. Each gradient has its argument's dtype.

    Raises:
        OfakernTypeError, OfakernValueError: an argument of the wrong type, dtype, device, shape or range.
        BackendError: the backend cannot run the call (images that need a gradient among the reasons).
            On a GPU an index outside [0,P) is not raised: it makes a row of NaN and gives the table no gradient.
        OfakernRuntimeError: a second derivative, or vmap (both work with backend="reference").

    Source: the patch embedding of ViT (arXiv 2010.11929), tubelets of ViViT (arXiv 2103.15691), images of different
    sizes packed as in NaViT (arXiv 2307.06304).
    """
    vectors = (bias, type_embedding, position, position_index, ln_weight, ln_bias)
    batched = isinstance(images, Tensor)
    given: list[Tensor] = [images] if batched else images if isinstance(images, list) else []  # type: ignore[list-item]
    if given and straight(backend, weight, *vectors, *given) and not torch._C._is_any_autocast_enabled():
        try:
            return _run_straight(given, batched, weight, layout, mean, std, vectors, eps)
        except OfakernError:
            pass  # refused: the checks below say why, or cast what can be cast
    call = _check(
        images, weight, bias, layout, mean, std, type_embedding, position, position_index, ln_weight, ln_bias, eps
    )
    chosen = op.BACKENDS.select(backend, call.weight, _limit(call))
    if log.ENABLED and not torch.compiler.is_compiling():
        log.once(_logger, _describe(call, chosen))
    if chosen == "reference":
        return patch_embed_reference(*call)
    layout = _LAYOUTS[weight.ndim][0] if layout is None else layout
    return op.run(chosen, layout, given or list(images), *call[1:])


def refusals(*args: object, **kwargs: object) -> tuple[str, dict[str, str | None]]:
    """What `ofakern.explain` prints of a call of `patch_embed`: the backend, and each one's reason against it."""
    bound = _signature.bind(*args, **kwargs)
    bound.apply_defaults()
    values = dict(bound.arguments)
    backend = str(values.pop("backend"))
    call = _check(**values)
    return op.BACKENDS.reasons(backend, call.weight, _limit(call))


def _run_straight(
    images: list[Tensor],
    batched: bool,
    weight: Tensor,
    layout: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    eps: float,
) -> Tensor:
    """Raises OfakernError where the kernel cannot take the arguments as they are, or where they break a rule."""
    choices = None if weight is None else _LAYOUTS.get(weight.ndim)
    layout = choices[0] if layout is None and choices else layout
    if not choices or layout not in choices:
        raise OfakernValueError(f"{_WHERE}: layout must be one of {choices}, got {layout!r}")
    dimensions = len(layout) + batched
    for image in images:
        if image is None or image.dtype not in _PIXELS or image.ndim != dimensions or image.requires_grad:
            raise OfakernTypeError(f"{_WHERE}: images must be pixels of {dimensions} dimensions without a gradient")
    numbers = (None if mean is None else tuple(mean), None if std is None else tuple(std))
    scale, shift = _kept_normalisation(*numbers, weight.shape[1], images[0].dtype == torch.uint8)
    return op.run(STRAIGHT, layout, images, weight, scale, shift, *vectors, eps)


def _limit(call: _Call) -> str | None:
    """What no kernel can do of a call."""
    if torch.is_grad_enabled() and any(image.requires_grad for image in call.images):
        return "gives no gradient to pixels"
    if any(image.dtype == torch.float64 for image in call.images):
        return "takes pixels of uint8, float32, bfloat16 and float16, got torch.float64"
    return None


def _check(
    images: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    layout: str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    type_embedding: Tensor | None,
    position: Tensor | None,
    position_index: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
) -> _Call:
    _check_float("weight", weight)
    if weight.ndim not in _LAYOUTS or weight.numel() == 0:
        raise OfakernValueError(
            f"{_WHERE}: weight must be [D,C,ph,pw] or [D,C,kt,ph,pw] and not empty, got shape {list(weight.shape)}"
        )
    views = _views(images, weight, layout)
    weight = autocast(weight)
    kernel = weight if weight.ndim == 5 else weight.unsqueeze(2)
    scale, shift = _normalisation(mean, std, kernel.shape[1], not views or views[0].dtype == torch.uint8)
    if (ln_weight is None) != (ln_bias is None):
        raise OfakernValueError(f"{_WHERE}: ln_weight and ln_bias must be given together, got only one")
    if not eps >= 0:
        raise OfakernValueError(f"{_WHERE}: eps must be at least 0, got {eps}")
    vectors = {"bias": bias, "type_embedding": type_embedding, "ln_weight": ln_weight, "ln_bias": ln_bias}
    ready = {name: None if x is None else _vector(name, x, weight) for name, x in vectors.items()}
    table, index = _positions(position, position_index, views, kernel)
    return _Call(
        *(views, kernel, scale, shift, ready["bias"], ready["type_embedding"], table, index),
        *(ready["ln_weight"], ready["ln_bias"], float(eps)),
    )


def _views(images: Tensor | Sequence[Tensor], weight: Tensor, layout: str | None) -> list[Tensor]:
    """Images as `[n,T,C,H,W]`, each a view of what was given."""
    choices = _LAYOUTS[weight.ndim]
    layout = choices[0] if layout is None else layout
    if layout not in choices:
        raise OfakernValueError(
            f"{_WHERE}: layout must be one of {', '.join(map(repr, choices))} for a weight of {weight.ndim} "
            f"dimensions, got {layout!r}"
        )
    if isinstance(images, Tensor):
        return [_view("images", images, weight, layout, batched=True)]
    if not isinstance(images, Sequence):
        raise OfakernTypeError(f"{_WHERE}: images must be a tensor or a sequence of them, got {type(images).__name__}")
    views = [_view(f"images[{n}]", image, weight, layout, batched=False) for n, image in enumerate(images)]
    for n, view in enumerate(views):
        if view.dtype != views[0].dtype:
            raise OfakernTypeError(f"{_WHERE}: images[{n}] must have images[0]'s {views[0].dtype}, got {view.dtype}")
    return views


def _view(name: str, image: Tensor, weight: Tensor, layout: str, batched: bool) -> Tensor:
    if not isinstance(image, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(image).__name__}")
    if image.dtype not in _PIXELS:
        raise OfakernTypeError(
            f"{_WHERE}: {name} must be uint8, float32, bfloat16, float16 or float64, got {image.dtype}"
        )
    if image.device != weight.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on weight's device ({weight.device}), got {image.device}")
    if image.ndim != len(layout) + batched:
        letters = ",".join((["n"] if batched else []) + list(layout.upper().replace("N", "n")))
        raise OfakernValueError(f"{_WHERE}: {name} must have shape [{letters}], got {list(image.shape)}")
    view = image if batched else image.unsqueeze(0)
    if "t" not in layout:
        view, layout = view.unsqueeze(1), "t" + layout
    view = view.permute(0, *(1 + layout.index(letter) for letter in "tchw"))
    if view.shape[2] != weight.shape[1]:
        raise OfakernValueError(
            f"{_WHERE}: {name} must have weight's {weight.shape[1]} channels in layout {layout.lstrip('t')!r}, got "
            f"{list(image.shape)}"
        )
    patch = (1, *weight.shape[2:])[-3:]
    for letter, side, multiple in zip("THW", (view.shape[1], *view.shape[3:]), patch, strict=True):
        if side % multiple:
            raise OfakernValueError(f"{_WHERE}: {name} must have {letter} a multiple of {multiple}, got {side}")
    return view


def _normalisation(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int, bytes_: bool
) -> tuple[list[float], list[float]]:
    """(pixel - mean) / std as scale * pixel + shift."""
    means, stds = [0.0] * channels if mean is None else list(mean), [1.0] * channels if std is None else list(std)
    for name, values in (("mean", means), ("std", stds)):
        if len(values) != channels:
            raise OfakernValueError(f"{_WHERE}: {name} must have {channels} numbers, one per channel, got {values}")
    if not all(value > 0 for value in stds):
        raise OfakernValueError(f"{_WHERE}: std must be positive, got {stds}")
    unit = 255.0 if bytes_ else 1.0
    return [1.0 / (unit * s) for s in stds], [-m / s for m, s in zip(means, stds, strict=True)]


def _positions(
    position: Tensor | None, index: Tensor | None, views: list[Tensor], weight: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if position is None:
        if index is not None:
            raise OfakernValueError(f"{_WHERE}: position_index must come with position, got no position")
        return None, None
    _check_float("position", position)
    if position.ndim != 2 or position.shape[1] != weight.shape[0]:
        raise OfakernValueError(
            f"{_WHERE}: position must have shape [P,D={weight.shape[0]}], got {list(position.shape)}"
        )
    _check_device("position", position, weight)
    patches = [
        (x.shape[1] // weight.shape[2]) * (x.shape[3] // weight.shape[3]) * (x.shape[4] // weight.shape[4])
        for x in views
    ]
    if index is None:
        if any(count > position.shape[0] for count in patches):
            raise OfakernValueError(
                f"{_WHERE}: position must have a row for every patch of an image, got {position.shape[0]} rows for "
                f"{max(patches)} patches\nTry: position_index, which names the row of every token."
            )
        return position.to(weight.dtype), None
    if not isinstance(index, Tensor) or index.dtype != torch.int32:
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise OfakernTypeError(f"{_WHERE}: position_index must be an int32 tensor, got {got}")
    tokens = sum(x.shape[0] * count for x, count in zip(views, patches, strict=True))
    if tuple(index.shape) != (tokens,):
        raise OfakernValueError(f"{_WHERE}: position_index must have shape [N={tokens}], got {list(index.shape)}")
    _check_device("position_index", index, weight)
    return position.to(weight.dtype), index


def _vector(name: str, x: Tensor, weight: Tensor) -> Tensor:
    _check_float(name, x)
    if tuple(x.shape) != (weight.shape[0],):
        raise OfakernValueError(f"{_WHERE}: {name} must have shape [D={weight.shape[0]}], got {list(x.shape)}")
    _check_device(name, x, weight)
    return x.to(torch.promote_types(weight.dtype, torch.float32))


def _check_device(name: str, x: Tensor, weight: Tensor) -> None:
    if x.device != weight.device:
        raise OfakernValueError(f"{_WHERE}: {name} must be on weight's device ({weight.device}), got {x.device}")


def _check_float(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise OfakernTypeError(f"{_WHERE}: {name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise OfakernTypeError(f"{_WHERE}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def _describe(call: _Call, backend: str) -> str:
    images = " ".join(str(list(image.shape)) for image in call.images[:4]) + (" ..." if len(call.images) > 4 else "")
    dtype = str(call.weight.dtype).removeprefix("torch.")
    return f"patch_embed images {images} weight{list(call.weight.shape)} {dtype} {call.weight.device} -> {backend}"


# A model has one of them, and making it takes longer than a small call's other checks. Not for what is traced.
_kept_normalisation = lru_cache(maxsize=64)(_normalisation)
_signature = inspect.signature(patch_embed)
