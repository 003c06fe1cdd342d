"""How much of a trained change is left after it has been merged into the weights and stored, as a
value with a display.

Retention ρ = ⟨Q(W + D) − Q(W), D⟩ / ‖D‖²: 1 means that storing keeps the change D whole (on average
over directions), 0 that rounding removes it. Knows neither how it was measured nor what Q is.
"""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qlab.core.config.legal import check_choice
from qlab.core.display import wide

TARGETS = {
    "16": "dense, in the model's own dtype",
    "8": "affine 8-bit g64",
    "base": "the base's own storage, from the dequantized base",
    "base_from_original": "the base's own storage, from the original weights",
}
ENOUGH = 0.9  # below that a merge is not what was trained
_ROWS = 12


@dataclass(frozen=True)
class LayerSurvival:
    """One adapted layer.

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
        kept_base_least: ρ in the base's own storage of the expert that keeps least of its change;
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

    def kept(self, target: str) -> float:
        """Retention of a target."""
        return getattr(self, f"kept_{target}")


@dataclass(frozen=True)
class Survival:
    """What survives a fuse, layer by layer.

    Attributes:
        model: name of the model.
        adapter: such as ``lora r8``.
        layers: in model order.
    """

    model: str
    adapter: str
    layers: tuple[LayerSurvival, ...]

    def kept(self, target: str) -> float:
        """Return ρ over all layers, each weighted by ‖D‖².

        NaN if the adapter changes nothing, or the target is unknown here.

        Args:
            target: ``16``, ``8``, ``base`` or ``base_from_original``.

        Raises:
            ConfigError: no such target.
        """
        target = self._target(target)
        weights = np.array([layer.delta_norm**2 for layer in self.layers])
        values = np.array([layer.kept(target) for layer in self.layers])
        known = weights > 0
        return (
            float((weights * values)[known].sum() / weights[known].sum())
            if known.any()
            else math.nan
        )

    def worst(self, count: int = 5, target: str = "base") -> tuple[LayerSurvival, ...]:
        """Return the layers that lose most of their change; those that have none come last."""
        target = self._target(target)
        values = [layer.kept(target) for layer in self.layers]
        order = sorted(
            range(len(values)), key=lambda i: math.inf if math.isnan(values[i]) else values[i]
        )
        return tuple(self.layers[i] for i in order[:count])

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know before fusing: what would be lost, and the cheapest way not to lose it."""
        if not any(layer.delta_norm for layer in self.layers):
            return ("The adapter changes nothing yet: there is nothing to lose.",)
        found = []
        for target in ("base", "8"):
            kept = self.kept(target)
            if kept < ENOUGH:
                found.append(
                    f"Stored as {self._name(target)}, {max(kept, 0):.0%} of the change survives. {self._way_out(target)}"
                )
        if self.kept("16") < ENOUGH:
            found.append(
                "Even dense weights lose part of this change, which is below their rounding: keep the adapter beside."
            )
        ratios = [
            layer.error_ratio
            for layer in self.layers
            if layer.delta_norm and not math.isnan(layer.error_ratio)
        ]
        if ratios:
            middle = float(np.median(ratios))
            found.append(
                f"The quantization error is {middle:.2g} × the change (median). onto='base' gives what was trained; "
                "onto='original' takes that error away, but what the adapter learned to make up for it stays: judge both."
            )
        return tuple(found)

    def _way_out(self, target: str) -> str:
        if target == "base" and self.kept("8") >= ENOUGH:
            way = f"Cheapest fix: bits=8 for the adapted layers ({self.kept('8'):.1%} survives)"
            if (
                ENOUGH <= self.kept("base_from_original") <= 2 - ENOUGH
            ):  # a start moves what rounding would have moved anyway
                kept = self.kept("base_from_original")
                way += f", or bits='base' with onto='original' ({kept:.0%} at the same size, with new rounding noise)"
            return way + "; bits=16 is the default."
        return "Cheapest fix: bits=16, or keep the adapter beside the base."

    def _name(self, target: str) -> str:
        stored = sorted({layer.stored for layer in self.layers if layer.stored})
        return " / ".join(stored) if target.startswith("base") and stored else TARGETS[target]

    def _target(self, target: str) -> str:
        target = str(target)
        check_choice("target", target, TARGETS)
        return target

    # --- display ----------------------------------------------------------------------------------

    def to_pandas(self) -> Any:
        """Return a data frame, a row a layer."""
        import pandas as pd

        return pd.DataFrame([asdict(layer) for layer in self.layers]).set_index("path")

    def _totals(self) -> list[tuple[str, str, str]]:
        totals = [(target, self.kept(target), text) for target, text in TARGETS.items()]
        return [
            (target, f"{kept:.3f}", text) for target, kept, text in totals if not math.isnan(kept)
        ]

    def __repr__(self) -> str:
        head = f"Survival({self.model!r}, {self.adapter}, {len(self.layers)} layers)"
        lines = [f"  {target:<18}  {kept}  {text}" for target, kept, text in self._totals()]
        return "\n".join([head, *lines, *self.notes])

    def _repr_html_(self) -> str:
        totals = "".join(
            f"<tr><td>{target}</td><td style='text-align:right'>{kept}</td>"
            f"<td><div style='background:#4c78a8;height:9px;width:{round(120 * min(max(float(kept), 0), 1))}px'></div></td>"
            f"<td>{text}</td></tr>"
            for target, kept, text in self._totals()
        )
        worst = self.worst(_ROWS)
        rows = "".join(
            f"<tr>{''.join(f'<td>{cell}</td>' for cell in _cells(layer))}</tr>" for layer in worst
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        table = (
            f"<table><thead><tr><th>worst {len(worst)} of {len(self.layers)} layers</th><th>stored as</th><th>‖D‖/‖W‖</th>"
            f"<th>‖E‖/‖D‖</th><th>ρ 16</th><th>ρ 8</th><th>ρ base</th><th>codes changed</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )
        return (
            f"<p><b>{html.escape(self.model)}</b> · {html.escape(self.adapter)} · share of the change that survives a fuse</p>"
            f"<table>{totals}</table>{f'<ul>{notes}</ul>' if notes else ''}{wide(table)}"
        )


def _cells(layer: LayerSurvival) -> list[str]:
    numbers = [
        f"{layer.relative_size:.2%}",
        f"{layer.error_ratio:.2g}",
        f"{layer.kept_16:.3f}",
        f"{layer.kept_8:.3f}",
    ]
    least = "" if math.isnan(layer.kept_base_least) else f" (an expert {layer.kept_base_least:.3f})"
    numbers += [f"{layer.kept_base:.3f}{least}", f"{layer.codes_changed:.1%}"]
    label = html.escape(layer.stored or "not quantized")
    return [
        html.escape(layer.path),
        label,
        *("–" if number.startswith("nan") else number for number in numbers),
    ]
