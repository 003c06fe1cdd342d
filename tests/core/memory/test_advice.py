"""Which training is advised as a machine gets smaller."""

from __future__ import annotations

from dataclasses import replace

from qlab.core.machine import budget
from qlab.core.memory.advice import advise
from tests.core.memory.estimates import EST, SETUP, at


def test_16_bit_weights_come_first_with_the_largest_batch_and_no_checkpoints():
    advice = advise(EST, at, budget(1e9))
    train = advice.estimate.setup.train
    assert advice.choice == "LoRA on 16-bit weights" and advice.estimate.setup.plan is None
    assert (train.batch_size, train.grad_checkpoint, train.grad_accumulation_steps) == (
        16,
        False,
        1,
    )
    assert "no rounding error" in advice.reason


def test_quantized_weights_come_where_16_bits_do_not_fit():
    one_row = replace(SETUP.train, batch_size=1, grad_checkpoint=True)
    need = at(replace(SETUP, plan=None, train=one_row)).high_nbytes
    advice = advise(EST, at, budget(need - 1))
    assert advice.choice == "QLoRA" and advice.estimate.setup.plan.default.bits == 8
    assert "qlab.QuantConfig(" in repr(advice)


def test_a_smaller_model_comes_last_with_what_the_least_step_needs():
    advice = advise(EST, at, budget(1000))
    assert advice.choice == "a smaller model" and advice.estimate is None and advice.code == ""
    assert "3-bit weights" in advice.reason and "one row of 100 tokens" in advice.reason
