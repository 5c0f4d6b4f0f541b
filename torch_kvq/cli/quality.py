"""How far a model's predictions move when its cache is quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Rows of logits compared at a time: bounds the memory of a large vocabulary.
_ROWS = 128


@dataclass(frozen=True)
class Quality:
    """Means over ``quality_tokens`` positions."""

    kld: float  #: KL divergence of the quantised from the exact distribution, nats per token
    same_top: float  #: share of positions with the same most likely token
    ppl_ratio: float  #: perplexity over the exact model's
    quality_tokens: int


class QualityMeter:
    """Accumulates :class:`Quality` over pieces of text."""

    def __init__(self) -> None:
        self._kld = self._same = self._loss = 0.0
        self._tokens = self._targets = 0

    def add(self, exact: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Compare two sets of logits of the same tokens.

        Args:
            exact, logits: [N, vocabulary], with the full-precision and the quantised cache.
            targets: int64 [M], M <= N: the tokens that the first M rows predict.
        """
        for first in range(0, exact.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            p, q = (_log_softmax(x[rows]) for x in (exact, logits))
            self._kld += (p.exp() * (p - q)).sum().item()
            self._same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            self._tokens += p.shape[0]
            chosen = targets[rows].to(p.device)[:, None]
            self._targets += len(chosen)
            worse = p[: len(chosen)].gather(-1, chosen) - q[: len(chosen)].gather(-1, chosen)
            self._loss += worse.sum().item()

    def result(self) -> Quality:
        tokens = max(self._tokens, 1)
        return Quality(
            kld=self._kld / tokens,
            same_top=self._same / tokens,
            ppl_ratio=math.exp(self._loss / max(self._targets, 1)),
            quality_tokens=self._tokens,
        )


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    # MPS has no float64; a difference of logarithms of 1e-5 needs it.
    wide = logits.cpu() if logits.device.type == "mps" else logits
    return wide.double().log_softmax(-1)
