"""Judges an adapter against the model before it was quantized.

Full precision, quantized, quantized + adapter. Wiring only.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from qlab.core.evaluate.judge import COLUMNS, JudgeReport
from qlab.core.progress import Progress
from qlab.core.train.rows import Rows
from qlab.engine.adapt.attach import twin_for_rows
from qlab.engine.evaluate.judge import judge
from qlab.engine.evaluate.teacher import KEEP, remember
from qlab.errors import ConfigError
from qlab.lab.adapter import Adapter
from qlab.runtime.job import Job


def judged(
    adapter: Adapter,
    rows: Rows | None,
    golden: Iterable[Mapping[str, Any]] = (),
    match: Any = "exact",
    prompts: Iterable[str] = (),
    max_tokens: int = 64,
    keep: int = KEEP,
) -> JudgeReport:
    """Judge an adapter on rows it was not trained on, on a golden set, and let it answer prompts.

    Blocks.

    The unquantized model's predictions are kept on disk, so that judging again costs only the
    others.

    Args:
        adapter: as it is now.
        rows: held out; None for none.
        golden: prompts with expected answers.
        match: ``exact``, ``contains`` or a function of answer and expected answer.
        prompts: answered by every model.
        max_tokens: longest answer.
        keep: tokens of the unquantized model's predictions that are kept at each target; the whole
            vocabulary is exact.

    Raises:
        ConfigError: there is nothing to judge by, or ``keep`` is no whole number above 0.
        DataError: the golden set has faults.
    """
    golden = tuple(golden)
    prompts = tuple([prompts] if isinstance(prompts, str) else prompts)
    if not rows and not golden and not prompts:
        raise ConfigError(
            "There is nothing to judge by: no rows are held out. Give rows, a golden set or prompts."
        )
    base = adapter.base
    original = adapter.original
    lora = adapter.config
    parameters = adapter.parameters

    def work() -> Generator[Progress, None, JudgeReport]:
        teacher = original.measurements.full_model() if original is not None else None
        kept = (
            (yield from remember(teacher, list(rows), keep))
            if teacher is not None and rows
            else None
        )
        bare = (
            {}
            if base is original
            else {COLUMNS[1]: twin_for_rows(base.module, base.spec, None, {})}
        )
        name = COLUMNS[2] if bare else f"{COLUMNS[0]} + adapter"
        students = {**bare, name: twin_for_rows(base.module, base.spec, lora, parameters)}
        return (
            yield from judge(
                teacher,
                students,
                list(rows or ()),
                kept=kept,
                tokenizer=adapter.model.tokenizer,
                prompts=prompts,
                golden=golden,
                match=match,
                max_tokens=max_tokens,
            )
        )

    return Job(work).start().wait()
