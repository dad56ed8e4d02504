"""Runs the Triton cases of every op but attention: interpreted everywhere, and compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from triton_setup import run_interpreted, run_on_gpu

from ofakern.ops import backends
from ofakern.ops.layer_norm import gelu_layer_norm

FILES = {
    "triton_layer_norm_cases.py": ("add_layer_norm", "gelu_layer_norm", "head_scale_layer_norm", "embed_layer_norm"),
    "triton_rms_norm_cases.py": ("rms_norm",),
    "triton_cross_entropy_cases.py": ("cross_entropy",),
    "triton_patch_embed_cases.py": ("patch_embed",),
    "triton_routed_ffn_cases.py": ("routed_ffn",),
}


@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    pytest.importorskip("triton")
    run_interpreted(file)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the compiled kernels cannot run here")
@pytest.mark.parametrize("file", FILES)
def test_on_a_gpu(file: str) -> None:
    run_on_gpu(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
@pytest.mark.parametrize("op", [op for ops in FILES.values() for op in ops])
def test_without_a_gpu_the_reason_is_told(op: str) -> None:
    reason = backends(op)["triton"]
    assert reason is not None and reason.startswith(("not yet run on a GPU", "triton is not installed"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_a_named_backend_never_falls_back() -> None:
    x = torch.ones(2, 8)
    with pytest.raises(
        RuntimeError, match="gelu_layer_norm: backend 'triton' cannot run this call: (not yet run|triton)"
    ):
        gelu_layer_norm(x, x[0], x[0], backend="triton")
