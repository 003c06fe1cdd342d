"""Evaluates an adapter beside its base and the model before it was quantized.

Three models side by side: full precision, quantized, quantized + adapter. ``Trainer.evaluate``
calls it; it runs as a job on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from qlab.core.config.legal import check_whole
from qlab.core.config.lora import LoRAConfig
from qlab.core.evaluate.judge import COLUMNS, JudgeReport
from qlab.core.progress import Progress
from qlab.core.train.rows import Rows
from qlab.deprecated import positional_arguments
from qlab.engine.adapt.attach import twin_for_rows
from qlab.engine.evaluate.golden import questions as check_golden
from qlab.engine.evaluate.judge import judge
from qlab.engine.evaluate.teacher import KEEP, teacher_predictions
from qlab.errors import ConfigError
from qlab.lab.adapter import Adapter
from qlab.lab.model import Model
from qlab.runtime.job import Job

_FULL, _QUANTIZED, _ADAPTED = COLUMNS
_NOTHING = (
    "There is nothing to evaluate on: no rows are held out. Give rows, a golden set or prompts."
)


@positional_arguments
def evaluate_adapter(
    adapter: Adapter,
    rows: Rows | None,
    golden: Iterable[Mapping[str, Any]] = (),
    *,
    match: Any = "exact",
    prompts: Iterable[str] = (),
    max_tokens: int = 64,
    keep: int = KEEP,
) -> JudgeReport:
    """Evaluate an adapter on rows, on questions with answers, and by its answers to prompts.

    Blocks. The unquantized model's predictions on rows are cached on disk.

    Args:
        adapter: as it is now.
        rows: tokens that it was not trained on; None for none.
        golden: questions: dicts with ``prompt`` and ``expected``.
        match: ``exact``, ``contains`` or a function of answer and expected answer.
        prompts: answered by every model.
        max_tokens: tokens of the longest answer.
        keep: likeliest predictions of the unquantized model that are cached for each target.

    Raises:
        ConfigError: there is nothing to evaluate on, or ``keep`` is no whole number above 0.
        DataError: the golden set has faults.
    """
    held_out = list(rows or ())
    questions = _checked_questions(golden, match)
    check_whole("max_tokens", max_tokens, 1)
    check_whole("keep", keep, 1)
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not held_out and not questions and not prompts:
        raise ConfigError(_NOTHING)
    # the adapter's sliders may move while the job runs
    base = adapter.base
    original = adapter.original
    config = adapter.config
    parameters = adapter.parameters

    def work() -> Generator[Progress, None, JudgeReport]:
        predictions = None
        teacher = original.measurements.full_model() if original is not None else None
        if teacher is not None and held_out:
            predictions = yield from teacher_predictions(teacher, held_out, keep)
        students = _students(base, original, config, parameters)
        report = yield from judge(
            teacher,
            students,
            held_out,
            predictions=predictions,
            tokenizer=adapter.model.tokenizer,
            prompts=prompts,
            golden=questions,
            match=match,
            max_tokens=max_tokens,
        )
        return report

    return Job(work).start().wait()


def _students(
    base: Model, original: Model | None, config: LoRAConfig, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the models to compare with full precision, by name of column; on the MLX thread."""
    students = {}
    adapted = f"{_FULL} + adapter"
    if base is not original:
        students[_QUANTIZED] = twin_for_rows(base.module, base.spec, None, {})
        adapted = _ADAPTED
    students[adapted] = twin_for_rows(base.module, base.spec, config, parameters)
    return students


def _checked_questions(golden: Any, match: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the rows of a golden set, which may be an iterator, once they are free of faults."""
    rows: Any = golden
    if isinstance(golden, Iterable) and not isinstance(golden, (str, bytes, Mapping)):
        rows = tuple(golden)
    check_golden(rows, match)
    return rows
