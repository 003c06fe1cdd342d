"""Evaluations as cards: models side by side (``JudgeReport``), or one against its original.

Registers the views of both reports; sees reports, never a model.
"""

from __future__ import annotations

import html as _html
import math

from qlab.core.display import view_of
from qlab.core.evaluate.judge import JudgeReport, Sample
from qlab.core.evaluate.text import EvalReport
from qlab.views.shared.markup import scrollable, table

_BAR = 90  # pixels
_COLOUR = "#4c78a8"
_LEFT = "style='text-align:left;vertical-align:top'"
_TEXT = "style='text-align:left;vertical-align:top;white-space:pre-wrap;max-width:320px'"
# measures with a bar under the number, so that three columns are compared at a glance: (line of the
# table, value, its error)
_DRAWN = {
    "perplexity": (lambda c: c.perplexity, lambda c: c.perplexity_se),
    "token accuracy": (lambda c: c.token_accuracy, lambda c: c.token_accuracy_se),
    "KL to full precision, nats": (lambda c: c.kl_nats, lambda c: c.kl_nats_se),
    "top-token flips": (lambda c: c.flips, lambda c: c.flips_se),
    "golden set (95 %)": (lambda c: c.golden_score, lambda c: c.golden_se),
}
_BETTER = {"token accuracy": "more is better", "golden set (95 %)": "more is better"}


@view_of(JudgeReport)
def html(report: JudgeReport) -> str:
    """Return the card.

    What changed in words, a line a measure with bars, then the answers to the same prompts.
    """
    verdict = "".join(f"<p>{_html.escape(sentence)}</p>" for sentence in report.verdict)
    head = "".join(f"<th {_LEFT}>{_html.escape(column.name)}</th>" for column in report.columns)
    rows = "".join(_line(report, line) for line in report.table())
    card = f"<table><thead><tr><th {_LEFT}></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div>{verdict}{scrollable(card)}{_samples(report)}{_small_print(report)}</div>"


def _line(report: JudgeReport, line: tuple[str, ...]) -> str:
    title = line[0]
    drawn = _DRAWN.get(line[0])
    values = [drawn[0](column) for column in report.columns] if drawn else []
    errors = [drawn[1](column) for column in report.columns] if drawn else []
    top = max((value for value in values if math.isfinite(value)), default=0) or 1.0
    cells = []
    for n, text in enumerate(line[1:]):
        bar = _bar(values[n] / top, errors[n] / top) if drawn and math.isfinite(values[n]) else ""
        cells.append(f"<td {_LEFT}>{_html.escape(text)}{bar}</td>")
    better = f"<br><small style='font-weight:400'>{_BETTER.get(title, 'less is better')}</small>"
    return f"<tr><th {_LEFT}>{_html.escape(title)}{better}</th>{''.join(cells)}</tr>"


def _bar(share: float, error: float) -> str:
    """Draw a bar from styled blocks, since untrusted notebooks drop SVG.

    Its paler end is one standard error wide.
    """
    width = max(1, round(_BAR * share))
    error_width = 0
    if math.isfinite(error):
        error_width = min(round(_BAR * error), _BAR)
    value_bar = f"<div style='background:{_COLOUR};width:{width}px'></div>"
    error_bar = f"<div style='background:{_COLOUR};opacity:.35;width:{error_width}px'></div>"
    return f"<div style='display:flex;height:6px'>{value_bar}{error_bar}</div>"


def _samples(report: JudgeReport) -> str:
    if not report.samples:
        return ""
    head = "".join(f"<th {_LEFT}>{_html.escape(column.name)}</th>" for column in report.columns)
    expected = any(sample.expected is not None for sample in report.samples)
    rows = "".join(_sample(sample, expected) for sample in report.samples)
    right = f"<th {_LEFT}>expected</th>" if expected else ""
    header = f"<tr><th {_LEFT}>prompt</th>{head}{right}</tr>"
    return scrollable(f"<table><thead>{header}</thead><tbody>{rows}</tbody></table>")


def _sample(sample: Sample, expected: bool) -> str:
    marks = [_mark(score) for score in sample.scores] or [""] * len(sample.texts)
    answers = "".join(
        f"<td {_TEXT}>{mark}{_html.escape(text)}</td>"
        for mark, text in zip(marks, sample.texts, strict=True)
    )
    right = f"<td {_TEXT}>{_html.escape(sample.expected or '')}</td>" if expected else ""
    return f"<tr><td {_TEXT}>{_html.escape(sample.prompt)}</td>{answers}{right}</tr>"


def _mark(score: float) -> str:
    """Write whether an answer is right, or how much of it."""
    marks = {1.0: "✓", 0.0: "✕"}
    text = marks.get(score) or f"{score:.0%}"
    return f"<b>{text}</b> "


def _small_print(report: JudgeReport) -> str:
    lines = [*report.small_print(), *report.notes]
    if report.rows:
        lines.insert(1, "The paler end of a bar is one standard error wide.")
    return "".join(f"<p><small>{_html.escape(line)}</small></p>" for line in lines)


@view_of(EvalReport)
def evaluation(report: EvalReport) -> str:
    """Return the table of a changed model against the original on one text."""
    kl = f"{report.kl_nats:.3g}"
    if math.isfinite(report.kl_nats_se):
        kl += f" ± {report.kl_nats_se:.2g}"
    rows = [
        ["KL to the original, nats/token", kl],
        ["KL, 99th percentile", f"{report.kl_nats_p99:.3g}"],
        ["top-token flips", f"{report.top1_flips:.1%}"],
        ["perplexity", f"{report.perplexity:.4g} (original {report.perplexity_before:.4g})"],
        ["tokens compared", f"{report.tokens:,}"],
    ]
    return table(["on held-out text", ""], rows)
