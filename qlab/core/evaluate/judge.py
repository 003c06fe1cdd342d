"""What models made of one another are worth, side by side.

Full precision, quantized, quantized + adapter. Pure numpy.

Every standard error treats a row as one draw, since the tokens of a row depend on one another:
counting tokens as draws gives errors several times too small. Knows neither how a figure was
measured nor how it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from qlab.core.display import Displayed
from qlab.core.evaluate.statistics import ratio, wilson
from qlab.deprecated import deprecated_name
from qlab.errors import ConfigError, nearest

COLUMNS = ("full precision", "quantized", "quantized + adapter")
MEASURES = ("nll", "hits", "kl_nats", "flips")


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class Column:
    """One model. All figures are over target tokens alone.

    Attributes:
        name: such as ``quantized + adapter``.
        nll: negative log-likelihood in nats per target.
        nll_se: its standard error.
        token_accuracy: share of targets that were the most likely token.
        token_accuracy_se: its standard error.
        kl_nats: mean KL(unquantized ‖ this) in nats per target; 0 for the unquantized model, NaN
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
        scores: what the figures were made of, so that two columns can be compared row by row; or
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
        return math.exp(self.nll) if not self.nll > 700 else math.inf

    @property
    def perplexity_se(self) -> float:
        """Standard error of the perplexity, to first order."""
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
        facts: dict[str, Any] = {}
        if scores is not None:
            fields = (
                ("nll", "nll"),
                ("token_accuracy", "hits"),
                ("kl_nats", "kl_nats"),
                ("flips", "flips"),
            )
            for key, source in fields:
                facts[key], facts[f"{key}_se"] = ratio(getattr(scores, source), scores.targets)
            if scores.kl_each.size:
                facts["kl_nats_p99"] = float(np.quantile(scores.kl_each, 0.99))
        if golden:
            mean = float(np.mean(golden))
            spread = float(np.std(golden))
            facts |= {"golden_score": mean, "golden_se": spread / math.sqrt(len(golden))}
            facts["golden_low"], facts["golden_high"] = wilson(mean, len(golden))
        return cls(name, **facts, seconds=seconds, scores=scores)


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


@dataclass(frozen=True)
class JudgeReport(Displayed):
    """Models side by side, on the same rows and the same prompts.

    Attributes:
        columns: the models; the unquantized one first, if there is one.
        samples: answers to prompts.
        rows: rows with at least one target.
        targets: tokens that count.
        teacher: how the unquantized model's predictions were kept: ``exact``, or in words what was
            left out; empty without an unquantized model.
        floor_nats: what the kept predictions cannot tell, 0 if exact: KL of the unquantized model
            to what was kept of it, its tail spread evenly. A KL from kept predictions is a lower
            bound; it is short by less than this wherever a model's tail is no worse than an even
            one.
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
        found = {column.name: column for column in self.columns}
        if name not in found:
            raise ConfigError(
                f"There is no column {name!r}; there are {', '.join(found)}.{nearest(name, found)}"
            )
        return found[name]

    def change(self, measure: str, of: str, against: str) -> tuple[float, float]:
        """Return by how much one column differs from another per target, and the standard error of
        the difference.

        Both saw the same rows, so rows are compared in pairs: this error is far smaller than those
        of the two columns.

        Args:
            measure: ``nll``, ``hits`` (token accuracy), ``kl_nats`` or ``flips``.
            of: name of a column.
            against: name of the other.

        Raises:
            ConfigError: unknown measure or column, or nothing was measured on rows.
        """
        if measure not in MEASURES:
            raise ConfigError(
                f"Unknown measure {measure!r}; choose one of {', '.join(MEASURES)}.{nearest(measure, MEASURES)}"
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
        found = []
        for before, after in zip(self.columns, self.columns[1:], strict=False):
            by, error = self.change("nll", after.name, before.name)
            word = "more" if by > 0 else "less"
            sure = math.isnan(error) or abs(by) > 2 * error
            text = f"{after.name}: {abs(by):.3g} ± {error:.2g} nats per target {word} than {before.name}"
            found.append(text + ("." if sure else ", which is within the error."))
        return tuple(found)

    def to_pandas(self) -> Any:
        """Return a data frame, a row a column of the card."""
        import pandas as pd

        names = [f.name for f in fields(Column) if f.name != "scores"]
        rows = [
            {name: getattr(c, name) for name in names} | {"perplexity": c.perplexity}
            for c in self.columns
        ]
        return pd.DataFrame(rows).set_index("name")

    def table(self) -> tuple[tuple[str, ...], ...]:
        """Return the figures as text: a line a measure, the first cell its name.

        Lines without a figure are left out.
        """
        return tuple(
            (title, *(cell(c) for c in self.columns))
            for title, cell in _LINES
            if any(cell(column) != _NOTHING for column in self.columns)
        )

    def __repr__(self) -> str:
        lines = [("", *(c.name for c in self.columns)), *self.table()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(
                c.ljust(w) if n == 0 else c.rjust(w)
                for n, (c, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        if self.rows:
            text.append(
                f"{self.targets} target tokens in {self.rows} rows; ± is one standard error, a row being one draw."
            )
        if self.teacher:
            text.append(
                f"Predictions at full precision: {self.teacher}; floor of the KL {self.floor_nats:.2g} nats."
            )
        answers = [self._answers(sample) for sample in self.samples]
        return "\n".join([*text, *self.verdict, *self.notes, *answers])

    def _answers(self, sample: Sample) -> str:
        names = (column.name for column in self.columns)
        texts = zip(names, sample.texts, strict=False)
        answers = [f"  {name}: {text}" for name, text in texts]
        return "\n".join([f"\n> {sample.prompt}", *answers])

    @property
    def report(self) -> JudgeReport:
        """Deprecated: the report itself."""
        deprecated_name("report of a JudgeReport", "the JudgeReport itself")
        return self


_NOTHING = "–"


def _with_error(value: float, error: float, form: str) -> str:
    if math.isnan(value):
        return _NOTHING
    text = format(value, form)
    return (
        text
        if math.isnan(error) or not error
        else f"{text} ± {error:.1%}"
        if "%" in form
        else f"{text} ± {error:.2g}"
    )


def _golden(column: Column) -> str:
    if math.isnan(column.golden_score):
        return _NOTHING
    return f"{column.golden_score:.1%} ({column.golden_low:.0%} to {column.golden_high:.0%})"


_LINES = (
    ("perplexity", lambda c: _with_error(c.perplexity, c.perplexity_se, ".4g")),
    ("token accuracy", lambda c: _with_error(c.token_accuracy, c.token_accuracy_se, ".1%")),
    ("KL to full precision, nats", lambda c: _with_error(c.kl_nats, c.kl_nats_se, ".3g")),
    ("KL, 99th percentile", lambda c: _with_error(c.kl_nats_p99, math.nan, ".3g")),
    ("top-token flips", lambda c: _with_error(c.flips, c.flips_se, ".1%")),
    ("golden set (95 %)", _golden),
)
