"""docs/PARITY.md: what `ofakern parity` found, case by case, and the quirks of the recorded systems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch

from ofakern.checkpoint.parity import BACKBONE_TOLERANCE, TOLERANCE, CaseResult, Check

__all__ = ["markdown", "worst"]

_QUIRKS = (
    (
        "OFASys: without relative tables the encoder scales scores by K^-0.5 and ignores the head weights",
        '`OFAConfig(compat="ofasys")`',
        "the configured scale and head weights",
        "v04, v05, v16",
    ),
    (
        "OFASys: with expert feed-forward layers a batch above 1 meets experts of other tokens' modalities",
        '`OFAConfig(compat="ofasys")`',
        "a token's own modality",
        "v07, v20, batch of 2",
    ),
    (
        "OFASys: a padded recording keeps up to one audio token that has seen padding",
        "`tokens_in_ofasys`",
        "`tokens_of`: the tokens of its own frames",
        "asr, audio variants",
    ),
    (
        "OFASys: the post-net of a padded sample sees the steps behind its end",
        "`hide_padding`: the recording's padding is kept as steps that no other step attends to",
        "the post-net sees a sample's own frames, and batch statistics are of those",
        "tts",
    ),
    (
        "OFASys: phones have a begin and an end of their own inside a group of text",
        "the recorded tokens are given to the model",
        "one begin and one end per group",
        "tts",
    ),
    (
        "OFASys: the loss of speech is a mean but counts as its number of frames, so it weighs less beside other tasks",
        "nothing: `LossSums` of one task divided by its tokens is that mean",
        "a sum over steps, like every other loss",
        "tts",
    ),
    (
        "OFASys: the model's entangle flag does not reach its adaptors",
        "`entangle_position_embedding=False` of each adaptor, as its configuration says",
        "adaptors follow the model",
        "v02, v04",
    ),
    (
        "OFASys, OFA port: a forced prefix may lose to another first token under beams",
        '`GenerationConfig(compat="ofasys")`',
        "prefixes are forced",
        "prefix_decoder_prompt, generate:text_b3_pad.beam5_prefix",
    ),
    (
        "fairseq, OFASys: the start token counts among the n-grams that may not repeat",
        '`GenerationConfig(compat="ofasys")`',
        "it does not",
        "generate:text_b3_pad.beam5_ngram3_min3",
    ),
    (
        "OFASys: frames of a video that are zero everywhere are padding",
        "such frames at the end are left out",
        "a frame is a frame",
        "video_caption",
    ),
    (
        "OFASys: an image's codes are drawn with Gumbel noise even outside training, so they differ from call to call",
        "nothing",
        "the most likely codes",
        "vqgan (`noiseless_argmax`)",
    ),
    (
        "OFASys: a generated box may be any four tokens, text any tokens",
        '`inference(compat="ofasys")`',
        "the target's grammar",
        "grounding_box_out",
    ),
    (
        "OFA port: `patch_masks` is ignored, an image that is not there is seen",
        "the case's image is kept",
        "a sample without an image has no image tokens",
        "imgtext_b2_mask01 against imgtext_b2_mask01.canonical",
    ),
    (
        "OFA port: drop path drops places of the sequence in all samples at once",
        '`OFAConfig(compat="ofa_hf")`, `from_pretrained(folder, compat="ofa_hf")`',
        "whole samples",
        "not recorded (training noise); tested for its pattern",
    ),
    (
        "OFA port: decoder pads are seen as keys",
        "nothing: only pad rows differ, and packed batches have none",
        "no pads",
        "all OFA cases",
    ),
)


def worst(checks: Sequence[Check]) -> tuple[float, float]:
    """The largest deviations that count: those under the absolute floor are rounding of an exact zero."""
    counted = [c for c in checks if not (c.passed and c.max_abs <= c.floor)]
    return max((c.rel_l2 for c in counted), default=0.0), max((c.max_rel for c in counted), default=0.0)


def markdown(results: Mapping[Path, Sequence[CaseResult]], backend: str) -> str:
    """The page."""
    folders = " ".join(str(directory) for directory in results)
    lines = [
        "# Parity with OFASys and OFA",
        "",
        f"Written by `ofakern parity {folders} --markdown docs/PARITY.md`",
        f"on {date.today().isoformat()} with torch {torch.__version__}, float32, attention backend `{backend}`.",
        "A quantity agrees when its relative L2 error and its largest error over the largest recorded value are both",
        f"at most {TOLERANCE:g}, at positions that are not padding. Generated tokens must be identical.",
        "",
        "- *adaptors*, *bias*: embeddings, positions, and the bias matrices that tables and coordinates stand for;",
        "- *encoder*, *decoder*: the states before, between and after all layers;",
        "- *cross attention*: what the last layer's target tokens give to the source, mean over the heads;",
        "- *any order*: each sample alone and the batch reversed, against the same recording;",
        "- *incremental*: one token at a time over the key-value cache;",
        "- *frames*: of a motion, from noisy ones; *schedule*, *sample*: its diffusion; *codes*: of an image;",
        "- *gradients*, *gradient norms*: of the smoothed loss per token, for every parameter. Key biases have the",
        "  exact gradient 0 (the recording holds rounding noise): they count as equal below 1e-7 of the largest norm.",
        f"  *backbone*: inside the vision trunk the bound is {BACKBONE_TOLERANCE:g}, because the recording's own",
        "  float32 rounding is up to 2.6e-4 there (against a float64 run of the same weights).",
        "",
        "## Quirks of the recorded systems",
        "",
        "| quirk | reproduced by | default here | recorded in |",
        "|---|---|---|---|",
        *(f"| {' | '.join(quirk)} |" for quirk in _QUIRKS),
    ]
    for directory, found in results.items():
        lines += [
            "",
            f"## {directory}",
            "",
            "| case | what | quantities | values | relative L2 | max error / max value | |",
        ]
        lines.append("|---|---|--:|--:|--:|--:|---|")
        for result in found:
            lines += _rows(result)
    return "\n".join(lines) + "\n"


def _rows(result: CaseResult) -> list[str]:
    if result.unavailable is not None:
        return [f"| {result.name} | cannot run: {result.unavailable} | | | | | |"]
    rows = []
    for group, checks in result.groups().items():
        rel_l2, max_rel = worst(checks)
        verdict = "ok" if all(c.passed for c in checks) else "**differs**"
        values = sum(c.count for c in checks)
        rows.append(
            f"| {result.name} | {group} | {len(checks)} | {values} | {rel_l2:.1e} | {max_rel:.1e} | {verdict} |"
        )
    return rows
