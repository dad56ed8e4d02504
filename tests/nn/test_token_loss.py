"""The loss of packed tokens against plain log-softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ofakern.data.batch import Allowed
from ofakern.errors import OfakernValueError
from ofakern.nn.loss import label_smoothed_cross_entropy


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, epsilon: float, allowed: Tensor | None) -> Tensor:
    logits = hidden @ weight.T
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    lprobs = logits.log_softmax(-1)
    total = torch.zeros((), dtype=hidden.dtype)
    for i, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        row = lprobs[i] if allowed is None else lprobs[i][allowed[i]]
        each = epsilon / (len(row) - 1) if len(row) > 1 else 0.0
        total = total - (1 - epsilon - each) * lprobs[i, label] - each * row.sum()
    return total


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("constrained", [False, True])
def test_loss_and_gradients(epsilon: float, constrained: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator).requires_grad_()
    weight = torch.randn(12, 6, generator=generator).requires_grad_()
    labels = torch.tensor([0, 5, -100, 3, 1, 11, 2, -100, 4, 7])
    allowed, mask = None, None
    if constrained:
        rows = [[0], [5, 6, 7], [], [3, 1], [], [11, 2, 9], [2], [1], list(range(12)), [7, 0]]
        offsets = torch.tensor([0, *(len(r) for r in rows)]).cumsum(0)
        allowed = Allowed(offsets, torch.tensor([i for r in rows for i in r]))
        mask = torch.tensor([[not r or i in r for i in range(12)] for r in rows])
    sums = label_smoothed_cross_entropy(hidden, weight, labels, epsilon, allowed)
    sums.loss.backward()
    a, b = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = plain(a, b, labels, epsilon, mask)
    expected.backward()
    assert int(sums.tokens) == 8
    torch.testing.assert_close(sums.loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, a.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, b.grad.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums.nll.double(), plain(a, b, labels, 0.0, mask).detach(), rtol=1e-5, atol=1e-5)


def test_no_token_and_wrong_shapes() -> None:
    sums = label_smoothed_cross_entropy(torch.zeros(0, 4), torch.zeros(5, 4), torch.zeros(0, dtype=torch.int64))
    assert float(sums.loss) == 0.0 and int(sums.tokens) == 0
    with pytest.raises(OfakernValueError, match="labels must be"):
        label_smoothed_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(OfakernValueError, match="weight must be"):
        label_smoothed_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 3), torch.zeros(3, dtype=torch.int64))


def test_the_worst_tokens_can_be_left_out() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4)
    labels = torch.tensor([1, 2, -100, 3, 4, 5, 6, 0, 1])
    each = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none", ignore_index=-100)
    best = torch.cat([each[:2], each[3:]]).sort().values[:6]  # int(8 * 0.8)
    sums = label_smoothed_cross_entropy(hidden, weight, labels, drop_worst=0.2)
    assert int(sums.tokens) == 6
    torch.testing.assert_close(sums.loss, best.sum())
    torch.testing.assert_close(sums.nll, best.sum().detach())
    with pytest.raises(OfakernValueError, match="drop_worst"):
        label_smoothed_cross_entropy(hidden, weight, labels, drop_worst=1.0)
