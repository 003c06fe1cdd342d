"""``JudgeReport``: models side by side on the same rows and the same prompts.

Such as full precision, quantized, and quantized + adapter. ``engine.evaluate.judge`` makes it,
``t.evaluate()`` returns it, ``views.cards.evaluation`` draws it. Pure numpy.

Every standard error treats a row as one draw, since the tokens of a row depend on one another:
counting tokens as draws gives errors several times too small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from qlab.core.display import Displayed
from qlab.core.evaluate.statistics import ratio, wilson
from qlab.core.evaluate.text import NOTHING, with_error
from qlab.deprecated import deprecated_name
from qlab.errors import ConfigError, nearest

COLUMNS = ("full precision", "quantized", "quantized + adapter")
MEASURES = ("nll", "hits", "kl_nats", "flips")
# figures of a column, and the sums in ``Scores`` that they are means of
_MEANS = {"nll": "nll", "token_accuracy": "hits", "kl_nats": "kl_nats", "flips": "flips"}
_LARGEST_EXPONENT = 700  # of a float64, a little less


@dataclass(frozen=True, eq=False, kw_only=True)
class Scores:
    """Sums over the target tokens of each row, float64 ``(R,)`` each.

    Attributes:
        targets: target tokens.
        nll: negative log-likelihood of the targets in nats.
        hits: targets that were the model's most likely token.
        kl_nats: KL(unquantized ‖ this) at the targets; NaN without an unquantized model.
        flips: targets at which the most likely token is not the unquantized model's; NaN without
            one.
        kl_each: KL at each target, ``(T,)``, for its upper tail; empty without an unquantized
            model.
    """

    targets: np.ndarray
    nll: np.ndarray
    hits: np.ndarray
    kl_nats: np.ndarray
    flips: np.ndarray
    kl_each: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Column:
    """One model. All figures are over target tokens alone.

    Attributes:
        name: such as ``quantized + adapter``.
        nll: mean negative log-likelihood in nats/token.
        nll_se: its standard error.
        token_accuracy: share of targets that were the most likely token.
        token_accuracy_se: its standard error.
        kl_nats: mean KL(unquantized ‖ this) in nats/token; 0 for the unquantized model, NaN
            without one.
        kl_nats_se: its standard error.
        kl_nats_p99: 99th percentile over targets.
        flips: share of targets at which the most likely token is not the unquantized model's; NaN
            without one.
        flips_se: its standard error.
        golden_score: mean score on the golden set, 0 to 1; NaN without one.
        golden_se: its standard error over questions (the binomial one, where answers are right or
            wrong).
        golden_low: lower end of Wilson's 95 % interval.
        golden_high: upper end.
        seconds: that this model took.
        scores: sums by row behind the figures, so that two columns can be compared row by row; or
            None.
    """

    name: str
    nll: float = math.nan
    nll_se: float = math.nan
    token_accuracy: float = math.nan
    token_accuracy_se: float = math.nan
    kl_nats: float = math.nan
    kl_nats_se: float = math.nan
    kl_nats_p99: float = math.nan
    flips: float = math.nan
    flips_se: float = math.nan
    golden_score: float = math.nan
    golden_se: float = math.nan
    golden_low: float = math.nan
    golden_high: float = math.nan
    seconds: float = 0.0
    scores: Scores | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """Exponential of ``nll``; infinite where that is too large."""
        if self.nll > _LARGEST_EXPONENT:
            return math.inf
        return math.exp(self.nll)

    @property
    def perplexity_se(self) -> float:
        """Standard error of the perplexity, to first order: perplexity · ``nll_se``."""
        return self.perplexity * self.nll_se

    @classmethod
    def of(
        cls, name: str, scores: Scores | None, golden: Sequence[float] = (), seconds: float = 0.0
    ) -> Column:
        """Summarize sums by row, and scores by question.

        Args:
            name: of the column.
            scores: sums by row; None without rows.
            golden: score of each answer, 0 to 1.
            seconds: that it took.
        """
        figures: dict[str, float] = {}
        if scores is not None:
            figures |= _row_figures(scores)
        if golden:
            figures |= _golden_figures(golden)
        return cls(name=name, **figures, seconds=seconds, scores=scores)


def _row_figures(scores: Scores) -> dict[str, float]:
    """Means per target with their standard errors, by the names of ``Column``'s attributes."""
    figures: dict[str, float] = {}
    for name, source in _MEANS.items():
        mean, error = ratio(getattr(scores, source), scores.targets)
        figures[name] = mean
        figures[f"{name}_se"] = error
    if scores.kl_each.size:
        figures["kl_nats_p99"] = float(np.quantile(scores.kl_each, 0.99))
    return figures


def _golden_figures(golden: Sequence[float]) -> dict[str, float]:
    """Mean score with its error √(variance/n) and Wilson's interval."""
    mean = float(np.mean(golden))
    low, high = wilson(mean, len(golden))
    return {
        "golden_score": mean,
        "golden_se": float(np.std(golden)) / math.sqrt(len(golden)),
        "golden_low": low,
        "golden_high": high,
    }


@dataclass(frozen=True)
class Sample:
    """What each model answers to one prompt.

    Attributes:
        prompt: what was asked.
        texts: answers, in the order of the columns; empty where a model was not in memory.
        expected: the right answer, or None.
        scores: of the answers, 0 to 1, in the order of the columns, NaN where a model was not in
            memory; empty without an expected answer.
    """

    prompt: str
    texts: tuple[str, ...]
    expected: str | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JudgeReport(Displayed):
    """Models side by side, on the same rows and the same prompts.

    Example::

        report = trainer.evaluate()     # rows held out, and the prompts of the trainer
        report["quantized + adapter"].perplexity
        report.change("nll", "quantized + adapter", "quantized")     # (difference, its error)
        report.to_pandas()

    Attributes:
        columns: the models; the unquantized one first, if there is one.
        samples: answers to prompts.
        rows: rows with at least one target.
        targets: tokens that count.
        teacher: how the unquantized model's predictions were stored: ``exact``, or in words what
            was left out; empty without an unquantized model.
        floor_nats: what the stored predictions cannot tell, 0 if exact: KL of the unquantized model
            to what was stored of it, its tail spread evenly. A KL from stored predictions is a
            lower bound; it is short by less than this wherever a model's tail is no worse than an
            even one.
        seconds: of everything.
        notes: what else to know.
    """

    columns: tuple[Column, ...]
    samples: tuple[Sample, ...] = ()
    rows: int = 0
    targets: int = 0
    teacher: str = ""
    floor_nats: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Column:
        """Return a column.

        Raises:
            ConfigError: there is none of that name.
        """
        by_name = {column.name: column for column in self.columns}
        if not isinstance(name, str) or name not in by_name:
            raise ConfigError(
                f"There is no column {name!r}; there are {', '.join(by_name)}."
                f"{nearest(name, by_name)}"
            )
        return by_name[name]

    def change(self, measure: str, of: str, against: str) -> tuple[float, float]:
        """Return by how much one column differs from another per target, and the error of that.

        Both saw the same rows, so rows are compared in pairs: this standard error is far smaller
        than those of the two columns.

        Args:
            measure: ``nll``, ``hits`` (token accuracy), ``kl_nats`` or ``flips``.
            of: name of a column.
            against: name of the other.

        Raises:
            ConfigError: unknown measure or column, or nothing was measured on rows.
        """
        if not isinstance(measure, str) or measure not in MEASURES:
            raise ConfigError(
                f"Unknown measure {measure!r}; choose one of {', '.join(MEASURES)}."
                f"{nearest(measure, MEASURES)}"
            )
        a = self[of].scores
        b = self[against].scores
        if a is None or b is None:
            raise ConfigError("These models were not measured on rows, only on prompts.")
        return ratio(getattr(a, measure) - getattr(b, measure), a.targets)

    @property
    def verdict(self) -> tuple[str, ...]:
        """What changed from each column to the next, as sentences."""
        if not self.rows:
            return ()
        pairs = zip(self.columns, self.columns[1:], strict=False)
        return tuple(self._change_in_words(before.name, after.name) for before, after in pairs)

    def _change_in_words(self, before: str, after: str) -> str:
        difference, error = self.change("nll", after, before)
        direction = "higher" if difference > 0 else "lower"
        amount = f"{abs(difference):.3g} ± {error:.2g}"
        sentence = f"{after}: loss (nats/token) {direction} by {amount} than {before}"
        is_clear = math.isnan(error) or abs(difference) > 2 * error
        return sentence + ("." if is_clear else ", which is within the error.")

    def to_pandas(self) -> Any:
        """Return a data frame, a row a model; its columns are the attributes of ``Column``."""
        import pandas as pd

        names = [f.name for f in fields(Column) if f.name != "scores"]
        rows = [
            {name: getattr(column, name) for name in names} | {"perplexity": column.perplexity}
            for column in self.columns
        ]
        return pd.DataFrame(rows).set_index("name")

    def table(self) -> tuple[tuple[str, ...], ...]:
        """Return the figures as text: a line a measure, the first cell its name.

        Lines without a figure are left out.
        """
        lines = []
        for title, cell in _LINES.items():
            cells = [cell(column) for column in self.columns]
            if any(text != NOTHING for text in cells):
                lines.append((title, *cells))
        return tuple(lines)

    def small_print(self) -> tuple[str, ...]:
        """Return what the figures rest on, as sentences."""
        lines = []
        if self.rows:
            lines.append(
                f"{self.targets} target tokens in {self.rows} rows; "
                "± is one standard error, a row being one draw."
            )
        if self.teacher:
            lines.append(
                f"Predictions at full precision: {self.teacher}; "
                f"floor of the KL {self.floor_nats:.2g} nats."
            )
        return tuple(lines)

    def __repr__(self) -> str:
        header = ("", *(column.name for column in self.columns))
        table = _aligned([header, *self.table()])
        answers = [self._answers_in_words(sample) for sample in self.samples]
        lines = [*table, *self.small_print(), *self.verdict, *self.notes, *answers]
        return "\n".join(lines)

    def _answers_in_words(self, sample: Sample) -> str:
        answers = [
            f"  {column.name}: {text}"
            for column, text in zip(self.columns, sample.texts, strict=False)
        ]
        return "\n".join([f"\n> {sample.prompt}", *answers])

    @property
    def report(self) -> JudgeReport:
        """Deprecated: the report itself."""
        deprecated_name("report of a JudgeReport", "the JudgeReport itself")
        return self


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells so that columns stand under one another: the first to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join(cells))
    return aligned


def _golden_cell(column: Column) -> str:
    if math.isnan(column.golden_score):
        return NOTHING
    return f"{column.golden_score:.1%} ({column.golden_low:.0%} to {column.golden_high:.0%})"


# Lines of the table: title, and how a column's cell is written.
_LINES: dict[str, Callable[[Column], str]] = {
    "perplexity": lambda c: with_error(c.perplexity, c.perplexity_se, ".4g"),
    "token accuracy": lambda c: with_error(c.token_accuracy, c.token_accuracy_se, ".1%"),
    "KL to full precision, nats": lambda c: with_error(c.kl_nats, c.kl_nats_se, ".3g"),
    "KL, 99th percentile": lambda c: with_error(c.kl_nats_p99, math.nan, ".3g"),
    "top-token flips": lambda c: with_error(c.flips, c.flips_se, ".1%"),
    "golden set (95 %)": _golden_cell,
}
