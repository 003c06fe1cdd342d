"""How much of a trained change is left once it is merged into the weights and stored.

``engine/adapt/fuse.py`` measures it, ``Adapter.preview`` returns it, ``views/adapter/retention.py``
draws it.

Retention ρ = ⟨Q(W + D) − Q(W), D⟩ / ‖D‖² of a change D of weights W under a storage Q: 1 means that
storing keeps the change whole (on average over directions), 0 that rounding removes it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlab.core.config.legal import check_choice
from qlab.core.display import Displayed
from qlab.deprecated import deprecated_name

TARGETS = {
    "16": "dense, in the model's own dtype",
    "8": "affine 8-bit g64",
    "base": "the base's own storage, from the dequantized base",
    "base_from_original": "the base's own storage, from the original weights",
}
ENOUGH = 0.9  # below that a merged model is not what was trained


@dataclass(frozen=True, kw_only=True)
class LayerRetention:
    """What is retained in one adapted layer, by target.

    Attributes:
        path: the layer.
        stored: label of the base's storage, or None if it is not quantized.
        delta_norm: ‖D‖, Frobenius.
        relative_size: ‖D‖ / ‖W‖, W being the base as it computes.
        error_ratio: ‖W0 − W‖ / ‖D‖: quantization error against the change; NaN without the original
            W0.
        kept_16: ρ of a dense layer.
        kept_8: ρ in 8 bits.
        kept_base: ρ in the base's own storage.
        kept_base_from_original: ρ in the base's own storage if D is added to W0; NaN without the
            original.
        codes_changed: share of the base's codes that D changes, dequantized base; NaN if it is not
            quantized.
        depth: ``exact``, or ``sampled`` where some rows spoke for all.
        kept_base_least: ρ in the base's own storage of the expert that retains least of its change;
            NaN if it is no mixture.
    """

    path: str
    stored: str | None
    delta_norm: float
    relative_size: float
    error_ratio: float
    kept_16: float
    kept_8: float
    kept_base: float
    kept_base_from_original: float
    codes_changed: float
    depth: str = "exact"
    kept_base_least: float = math.nan

    def retained(self, target: str) -> float:
        """Return ρ of a target."""
        return getattr(self, f"kept_{target}")


@dataclass(frozen=True)
class RetentionReport(Displayed):
    """What a fuse retains of an adapter, layer by layer.

    Example:
        >>> report = a.preview()
        >>> report.retained("base")  # stored as the base stores them
        0.79
        >>> report.worst(3)
        >>> report.to_pandas()

    Attributes:
        model: name of the model.
        adapter: such as ``lora r8``.
        layers: in model order.
    """

    model: str
    adapter: str
    layers: tuple[LayerRetention, ...]

    def retained(self, target: str) -> float:
        """Return ρ over all layers, each weighted by ‖D‖².

        NaN if the adapter changes nothing, or the target is unknown here.

        Args:
            target: ``16``, ``8``, ``base`` or ``base_from_original``.

        Raises:
            ConfigError: no such target.
        """
        target = _checked(target)
        weights = np.array([layer.delta_norm**2 for layer in self.layers])
        shares = np.array([layer.retained(target) for layer in self.layers])
        changed = weights > 0
        if not changed.any():
            return math.nan
        return float((weights * shares)[changed].sum() / weights[changed].sum())

    def kept(self, target: str) -> float:
        """Old name of ``retained``."""
        deprecated_name("kept(target)", "retained(target)")
        return self.retained(target)

    def worst(self, count: int = 5, target: str = "base") -> tuple[LayerRetention, ...]:
        """Return the layers that lose most of their change; those that have none come last."""
        target = _checked(target)

        def order(layer: LayerRetention) -> float:
            share = layer.retained(target)
            return math.inf if math.isnan(share) else share

        return tuple(sorted(self.layers, key=order)[:count])

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before fusing: what would be lost, and the cheapest way not to lose it."""
        if not any(layer.delta_norm for layer in self.layers):
            return ("The adapter changes nothing yet: there is nothing to lose.",)
        notes = [self._loss(target) for target in ("base", "8")]
        if self.retained("16") < ENOUGH:
            notes.append(
                "Even dense weights lose part of this change, which is below their rounding: "
                "do not fuse it; use the adapter beside the base."
            )
        notes.append(self._error())
        return tuple(note for note in notes if note)

    def _loss(self, target: str) -> str:
        """Say what a target loses, and the cheapest fix; empty if it is little."""
        share = self.retained(target)
        if not share < ENOUGH:  # nor for NaN
            return ""
        return (
            f"Stored as {self._name(target)}, {max(share, 0):.0%} of the change is retained. "
            f"{self._fix(target)}"
        )

    def _fix(self, target: str) -> str:
        eight = self.retained("8")
        if target != "base" or not eight >= ENOUGH:
            return "Cheapest fix: bits=16, or use the adapter beside the base."
        fix = f"Cheapest fix: bits=8 for the adapted layers ({eight:.1%} retained)"
        share = self.retained("base_from_original")
        # an error-compensating initialization moves what rounding would have moved anyway: then ρ
        # is far from 1 on either side
        if ENOUGH <= share <= 2 - ENOUGH:
            fix += (
                f", or bits='base' with onto='original' ({share:.0%} at the same size, "
                "with new rounding noise)"
            )
        return f"{fix}; bits=16 is the default."

    def _error(self) -> str:
        """Compare the quantization error with the change; empty if no original is known."""
        ratios = [layer.error_ratio for layer in self.layers if layer.delta_norm]
        ratios = [ratio for ratio in ratios if not math.isnan(ratio)]
        if not ratios:
            return ""
        return (
            f"The quantization error is {float(np.median(ratios)):.2g} × the change (median). "
            "onto='base' gives what was trained; onto='original' takes that error away, but what "
            "the adapter learned to compensate for it stays: evaluate both."
        )

    def _name(self, target: str) -> str:
        labels = sorted({layer.stored for layer in self.layers if layer.stored})
        if target.startswith("base") and labels:
            return " / ".join(labels)
        return TARGETS[target]

    def totals(self) -> list[tuple[str, float, str]]:
        """Return the targets that are known here, each with ρ over all layers and what it is."""
        rows = [(target, self.retained(target), text) for target, text in TARGETS.items()]
        return [row for row in rows if not math.isnan(row[1])]

    def to_pandas(self) -> Any:
        """Return a data frame, a row a layer."""
        import pandas as pd

        return pd.DataFrame([asdict(layer) for layer in self.layers]).set_index("path")

    def __repr__(self) -> str:
        head = f"RetentionReport({self.model!r}, {self.adapter}, {len(self.layers)} layers)"
        lines = [f"  {target:<18}  {share:.3f}  {text}" for target, share, text in self.totals()]
        return "\n".join([head, *lines, *self.notes])


def _checked(target: str) -> str:
    target = str(target)
    check_choice("target", target, TARGETS)
    return target
