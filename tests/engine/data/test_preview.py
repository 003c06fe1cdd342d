"""What a person checks before the first step: each token's text, what is cut, what is shared."""

from __future__ import annotations

import pytest

from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Rows
from qlab.engine.data.batches import Feed
from qlab.engine.data.preview import pieces, report
from qlab.engine.data.tokenize import read
from tests import templates as t

CONFIG = TrainConfig(max_seq_length=64)
TEXTS = ["A first sentence.", "Another one, é 👍🏽.", "A third\nwith two lines."]


@pytest.fixture(scope="module")
def tokenizer(demo):
    return demo.tokenizer


def test_pieces_join_to_the_text(tokenizer, smollm2_path):
    text = " a\n\nb  c é 👍🏽\n\n\n d — “quoted” \t end "
    for made in (tokenizer, t.of_gguf(smollm2_path)):
        (row,) = read([text], made, CONFIG)
        found = pieces(row, made)
        assert len(found) == row.tokens.size and "".join(found) == made.decode(row.tokens.tolist())


def test_report_holds_what_a_person_checks(tokenizer):
    rows = read([*TEXTS, "word " * 80], tokenizer, CONFIG)
    made = report(Feed(rows, CONFIG), tokenizer, held=Rows(rows.rows[:1]), first=4)
    assert made.shown[3].beyond.startswith(" word") and made.shown[0].beyond == ""
    assert (made.held, made.held_shared, made.per_epoch) == (1, 1, 1)
