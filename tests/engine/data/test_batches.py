"""Batches: every row once, few lengths, little padding, the same in every process, and never a target that is none."""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from qlab.core.train.rows import Row
from qlab.core.train.rows import Rows
from qlab.core.train.rows import order
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.data.batches import Feed
from qlab.engine.data.batches import _groups
from qlab.nn.frozen import Compute
from qlab.engine.step.protocol import LossAndGradients, StepBatch
from qlab.engine.adapt.attach import attach
from qlab.engine.step.choose import make_step
from tests.tiny import on_mlx, tiny


def rows_of(lengths) -> Rows:
    """Rows whose tokens tell which row they are of, and whose second half are targets."""
    made = []
    for number, length in enumerate(lengths):
        mask = (np.arange(length) >= max(length // 2, 1)).astype(np.uint8)
        made.append(Row(number=number, tokens=np.full(length, number + 1, np.int32), mask=mask))
    return Rows(tuple(made))


def alpaca(count=4000) -> Rows:
    """Lengths as instruction data has them: median 95, a long tail."""
    drawn = np.random.default_rng(0).lognormal(np.log(95), 0.62, count)
    return rows_of(np.clip(drawn.astype(int), 20, 512))


SHAPES = {
    "like": [40] * 10,
    "one": [7],
    "fewer than a batch": [9, 30],
    "short": range(20, 61),
    "long tail": [500, *[20] * 21],
    "just fits": [512, 512, 2, 2],
    "unlike": range(2, 300, 7),
}


@pytest.mark.parametrize("pack", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_row_passes_once_an_epoch_whole_and_nothing_else_is_a_target(name, pack):
    rows = rows_of(SHAPES[name])
    feed = Feed(rows, TrainConfig(pack=pack, batch_size=4))
    computed = 0
    for epoch in (0, 1, 5):
        seen = Counter()
        for i in range(feed.per_epoch):
            batch = feed.batch(epoch * feed.per_epoch + i)
            assert (
                batch.shape in feed.shapes
                and batch.targets > 0
                and (batch.segments is None) != pack
            )
            computed += batch.tokens.size if epoch == 0 else 0
            for b, numbers in enumerate(batch.numbers):
                seen.update(numbers)
                expected = np.concatenate([rows.rows[n].tokens for n in numbers])
                length = expected.size
                assert (
                    np.array_equal(batch.tokens[b, :length], expected)
                    and not batch.tokens[b, length:].any()
                )
                assert np.array_equal(
                    batch.mask[b, :length], np.concatenate([rows.rows[n].mask for n in numbers])
                )
                assert not batch.mask[b, length:].any()
                if pack:
                    marks = np.repeat(
                        np.arange(len(numbers)) + 1, [rows.rows[n].tokens.size for n in numbers]
                    )
                    assert (
                        np.array_equal(batch.segments[b, :length], marks)
                        and not batch.segments[b, length:].any()
                    )
            assert batch.real == sum(
                rows.rows[n].tokens.size for numbers in batch.numbers for n in numbers
            )
        assert seen == Counter(range(len(rows)))
    assert feed.waste == pytest.approx(computed / rows.tokens)


def test_a_batch_depends_on_its_number_alone():
    rows, config = alpaca(200), TrainConfig(seed=3)
    one, other = Feed(rows, config), Feed(rows, config)
    asked = [7, 120, 0, 51, 7]
    for number in asked:
        a, b = one.batch(number), other.batch(number)
        assert np.array_equal(a.tokens, b.tokens) and a.numbers == b.numbers
    other = Feed(rows, TrainConfig(seed=4))
    assert [one.batch(i).numbers for i in range(9)] != [other.batch(i).numbers for i in range(9)]


def test_another_process_gives_the_same_batches():
    code = (
        "import numpy as np; from tests.engine.data.test_batches import *;"
        "print([Feed(alpaca(60), TrainConfig(seed=3, pack=p)).batch(40).numbers for p in (False, True)])"
    )
    expected = str(
        [Feed(alpaca(60), TrainConfig(seed=3, pack=p)).batch(40).numbers for p in (False, True)]
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == expected


def test_order_is_the_same_for_ever():
    assert order(8, 0, 2, 1).tolist() == [3, 4, 0, 6, 1, 2, 7, 5]


def test_epochs_differ_in_order_and_in_who_meets_whom():
    feed = Feed(rows_of([30] * 40), TrainConfig(batch_size=4))
    first, second = (
        [feed.batch(e * feed.per_epoch + i).numbers for i in range(feed.per_epoch)] for e in (0, 1)
    )
    assert first != second and {frozenset(b) for b in first} != {frozenset(b) for b in second}


def test_lengths_are_few_and_padding_is_little():
    feed = Feed(alpaca(), TrainConfig())
    assert len({length for _, length in feed.shapes}) <= 16 and feed.waste < 1.09
    assert len({length for _, length in Feed(alpaca(900), TrainConfig()).shapes}) <= 8
    assert feed.shapes[0][0] * feed.shapes[0][1] == max(
        rows * length for rows, length in feed.shapes
    )
    packed = Feed(alpaca(), TrainConfig(pack=True))
    assert packed.waste < 1.01 and len(packed.shapes) <= 2
    short = rows_of(np.random.default_rng(1).integers(20, 61, 1000))
    assert (
        Feed(short, TrainConfig()).waste < 1.06 and Feed(short, TrainConfig(pack=True)).waste < 1.02
    )


def test_no_other_parting_wastes_less():
    from itertools import combinations

    sizes = np.sort(np.random.default_rng(2).integers(5, 90, 30))
    found = _groups(sizes, 3, 4)
    cost = sum((end - start) * length for start, end, length in found)
    ends = range(3, 30, 3)
    best = min(
        sum((b - a) * int(sizes[b - 1]) for a, b in zip((0, *cuts), (*cuts, 30), strict=True))
        for k in range(4)
        for cuts in combinations(ends, k)
    )
    assert cost == best and len(found) <= 4 and found[0][0] == 0 and found[-1][1] == 30


def test_many_lengths_are_parted_quickly_and_well():
    sizes = np.arange(1, 4097)
    started = time.process_time()
    found = _groups(sizes, 1, 8)
    assert time.process_time() - started < 2
    ideal = 512 * 512 * sum(range(1, 9))  # eight groups of equal length
    assert ideal <= sum((end - start) * length for start, end, length in found) < 1.001 * ideal


def test_iters_follow_epochs():
    rows = rows_of([10] * 41)
    assert Feed(rows, TrainConfig(iters=7)).iters == 7
    assert Feed(rows, TrainConfig(epochs=2.0)).iters == 22
    assert Feed(rows, TrainConfig(epochs=0.5, grad_accumulation_steps=2)).iters == 3
    assert Feed(rows, TrainConfig(epochs=0.001)).iters == 1


@on_mlx
def test_padding_and_packing_add_nothing_to_loss_and_gradient():
    rows = rows_of([5, 17, 9, 2])
    module, spec = tiny()
    totals = []
    for config in (
        TrainConfig(batch_size=4),
        TrainConfig(batch_size=1),
        TrainConfig(batch_size=2, pack=True, max_seq_length=26),
    ):
        step = make_step(
            attach(module, spec, LoRAConfig(rank=2), Compute(None, True), False), config
        )
        mx.random.seed(0)
        drawn = {p: mx.random.normal(a.shape) * 0.1 for p, a in sorted(step.parameters.items())}
        feed = Feed(rows, config)
        batches = [feed.batch(i) for i in range(feed.per_epoch)]
        segments = [None if b.segments is None else mx.array(b.segments) for b in batches]
        sums = [
            step(drawn, StepBatch(mx.array(b.tokens), mx.array(b.mask), segments=s))
            for b, s in zip(batches, segments, strict=True)
        ]
        total = functools.reduce(LossAndGradients.plus, sums)
        mx.eval(total)
        totals.append(total)
        assert total.count.item() == rows.targets
    for other in totals[1:]:
        assert other.loss.item() == pytest.approx(totals[0].loss.item(), rel=1e-5)
        for path, grad in totals[0].grads.items():
            assert np.allclose(np.array(grad), np.array(other.grads[path]), rtol=1e-3, atol=1e-4)
