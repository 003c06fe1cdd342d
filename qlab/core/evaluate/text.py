"""``EvalReport``: a quantized model against the original on held-out text.

``engine.evaluate.divergence`` makes it, ``q.evaluate()`` returns it, ``views.cards.evaluation``
draws it. Models side by side on rows with targets are a ``JudgeReport``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qlab.core.display import Displayed


@dataclass(frozen=True, kw_only=True)
class EvalReport(Displayed):
    """A changed model against the original, on text that neither was calibrated on.

    Example::

        report = q.evaluate()
        report.kl_nats, report.perplexity - report.perplexity_before

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
        """Summarize values per token, float64 ``(T,)`` each.

        Args:
            kl: KL(original ‖ changed) in nats.
            flips: 1 where the most likely token changed.
            nll: negative log-likelihood of the next token by the changed model, in nats.
            nll_before: the same by the original.
        """
        kl_se = math.nan
        if kl.size > 1:
            kl_se = float(kl.std(ddof=1) / math.sqrt(kl.size))
        return cls(
            kl_nats=float(kl.mean()),
            kl_nats_se=kl_se,
            kl_nats_p99=float(np.quantile(kl, 0.99)),
            top1_flips=float(flips.mean()),
            perplexity=math.exp(nll.mean()),
            perplexity_before=math.exp(nll_before.mean()),
            tokens=int(kl.size),
        )


NOTHING = "–"  # shown where there is no figure


def with_error(value: float, error: float, form: str) -> str:
    """Write a figure with its standard error, such as ``0.39 ± 0.02``.

    Args:
        value: the figure; NaN is written as a dash.
        error: its standard error; NaN or 0 is left out.
        form: format of the figure; the error is a share too where it ends in ``%``.
    """
    if math.isnan(value):
        return NOTHING
    text = format(value, form)
    if math.isnan(error) or error == 0:
        return text
    error_form = ".1%" if form.endswith("%") else ".2g"
    return f"{text} ± {format(error, error_form)}"
