"""``EvalReport``: the loss of a model on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qlab.core.display import Displayed


@dataclass(frozen=True)
class EvalReport(Displayed):
    """A changed model against the original, on text that neither was calibrated on.

    Attributes:
        kl_nats: mean KL(original ‖ changed) in nats per token.
        kl_nats_se: its standard error over tokens (neighbouring tokens are correlated, so this is a
            lower bound).
        kl_nats_p99: 99th percentile of the KL per token.
        top1_flips: share of positions whose most likely token changed.
        perplexity: of the changed model.
        perplexity_before: of the original.
        tokens: positions compared.
    """

    kl_nats: float
    kl_nats_se: float
    kl_nats_p99: float
    top1_flips: float
    perplexity: float
    perplexity_before: float
    tokens: int

    @classmethod
    def from_tokens(
        cls, kl: np.ndarray, flips: np.ndarray, nll: np.ndarray, nll_before: np.ndarray
    ) -> EvalReport:
        """Summarize values per token, float64 ``(T,)`` each (negative log-likelihoods in nats)."""
        return cls(
            kl_nats=float(kl.mean()),
            kl_nats_se=float(kl.std(ddof=1) / math.sqrt(kl.size)) if kl.size > 1 else math.nan,
            kl_nats_p99=float(np.quantile(kl, 0.99)),
            top1_flips=float(flips.mean()),
            perplexity=math.exp(nll.mean()),
            perplexity_before=math.exp(nll_before.mean()),
            tokens=int(kl.size),
        )
