"""A structure from a config alone: nothing is allocated, and sizes that cannot be are refused."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from qlab.engine.io.config_file import check, context, structure
from qlab.engine.models.skeleton import describe
from qlab.errors import ConfigError, LoadError
from qlab.runtime.job import mlx_call
from qlab.runtime.paths import ASSETS

CONFIG = json.loads((ASSETS / "demo" / "config.json").read_text())


def test_the_demo_is_the_same_from_its_name_its_folder_its_file_and_its_config():
    folder = ASSETS / "demo"

    def specs():
        sources = ("demo", folder, folder / "config.json", CONFIG)
        return [describe(structure(source).module, "x") for source in sources]

    first, *others = mlx_call(specs)
    assert first.size == 5_247_232 and all(other == first for other in others)


def test_names_are_those_of_the_folder(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    for source in (tmp_path / "m", tmp_path / "m" / "config.json"):
        assert mlx_call(lambda s=source: structure(s).name) == "m"


def test_nothing_is_allocated():
    def work():
        before = mx.get_active_memory()
        large = {**CONFIG, "num_hidden_layers": 80, "hidden_size": 8192, "head_dim": 128}
        structure(large)
        return mx.get_active_memory() - before

    assert mlx_call(work) < 1e6


def test_quantized_storage_is_read_from_the_block():
    block = {"bits": 4, "group_size": 64}
    config = {**CONFIG, "quantization": block}
    stored = mlx_call(lambda: describe(structure(config).module, "x"))
    dense = mlx_call(lambda: describe(structure(CONFIG).module, "x"))
    assert stored.nbytes < 0.4 * dense.nbytes


def test_foreign_storage_is_said():
    config = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}
    [note] = mlx_call(lambda: structure(config).notes)
    assert "stored by bitsandbytes" in note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not legal"),
        ({"hidden_size": True}, "hidden_size=True is not legal"),
        ({"text_config": 3}, "text_config=3 is not legal"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "cannot share 2 key-value heads"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None}, "no head_dim"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        check({**CONFIG, **changes})


def test_fields_that_are_missing_are_named():
    config = {key: value for key, value in CONFIG.items() if key != "vocab_size"}
    with pytest.raises(ConfigError, match="no vocab_size, which a 'llama' model needs"):
        mlx_call(lambda: structure(config))


def test_an_unknown_architecture_is_said():
    with pytest.raises(LoadError, match="Unknown architecture 'lama'"):
        mlx_call(lambda: structure({**CONFIG, "model_type": "lama"}))


def test_the_context_is_read_also_from_the_part_that_reads_text():
    assert context({"text_config": {"max_position_embeddings": 7}}) == 7
    assert context({}) is None
