"""An estimate names its level, falls back with a note where a level cannot be had, and needs no weights and little memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from qlab.core.machine import budget
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.memory.setup import Setup
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.memory import trace
from qlab.runtime import peaks as record
from qlab.engine.memory import read_graph
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.measure import measured_peak
from qlab.engine.models.skeleton import skeleton
from qlab.errors import ConfigError
from qlab.errors import UnsupportedError
from tests.tiny import ARCHITECTURES, on_mlx, settings, tiny

MACHINE = budget("16 GB Mac")
TRAIN = dict(batch_size=2, max_seq_length=96, loss_chunk=64)
BIG = """
import resource, sys, time
import qlab
start = time.process_time()  # what this machine, busy as it is, takes for plain Python
table = {}
for number in range(3_000_000):
    table[number % 1000] = number
print(time.process_time() - start)
config = dict(
    model_type="llama", hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
    num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=128256, max_position_embeddings=8192, tie_word_embeddings=False,
    torch_dtype="bfloat16",
)
train = qlab.TrainConfig(batch_size=1, max_seq_length=2048, grad_checkpoint=True)
for level in ("formula", "traced"):
    start = time.process_time()  # the machine may be busy
    found = qlab.estimate(config, qlab.QuantConfig(), qlab.LoRAConfig(rank=16), train, level=level)
    print(found.total_nbytes, found.level, time.process_time() - start)
if sys.platform == "linux":  # where getrusage would count what the parent held at the fork
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "path", lambda: tmp_path / "memory.jsonl")


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
@on_mlx
def test_every_architecture_has_an_estimate(name, checkpoint):
    forecast = Forecast(skeleton(settings(name)), name)
    length = 20 if name == "mamba" else 96  # its steps grow with the length
    setup = Setup(
        None,
        LoRAConfig(rank=4),
        TrainConfig(**{**TRAIN, "max_seq_length": length}, grad_checkpoint=checkpoint),
    )
    one, two = (forecast.estimate(setup, MACHINE, level) for level in ("formula", "traced"))
    assert two.level == "traced" and one.level == ("traced" if name == "mamba" else "formula")
    assert (one.level == "formula") == (not one.notes)
    assert one.total_nbytes == pytest.approx(two.total_nbytes, rel=0.12)
    assert one.exact_nbytes == two.exact_nbytes == sum(forecast.inputs(setup).values())


@pytest.mark.parametrize("broken, level", [("by_trace", "traced"), ("by_formula", "formula")])
@on_mlx
def test_where_a_level_cannot_be_had_the_other_is_given_and_said(broken, level, monkeypatch):
    forecast = Forecast(skeleton(settings("llama")), "tiny")

    def refuse(*_):
        raise UnsupportedError("an operation that cannot be read")

    monkeypatch.setattr(forecast, broken, refuse)
    found = forecast.estimate(Setup(None, LoRAConfig(rank=4), TrainConfig(**TRAIN)), MACHINE, level)
    assert found.level != level and level in found.notes[0] and "cannot be read" in found.notes[0]
    monkeypatch.setattr(forecast, "by_trace", refuse)
    monkeypatch.setattr(forecast, "by_formula", refuse)
    with pytest.raises(UnsupportedError):
        forecast.estimate(Setup(None, LoRAConfig(rank=4), TrainConfig(**TRAIN)), MACHINE, level)


@on_mlx
def test_a_model_that_cannot_be_taken_apart_is_predicted_as_it_will_be_computed(monkeypatch):
    forecast = Forecast(skeleton(settings("llama")), "tiny")
    monkeypatch.setitem(vars(forecast.graphs), "why_whole", "it does more with its blocks")
    found, whole = (
        forecast.estimate(
            Setup(None, LoRAConfig(rank=4), TrainConfig(**{**TRAIN, **more})), MACHINE, "traced"
        )
        for more in (dict(grad_checkpoint=True), dict(loss_chunk=0))
    )
    assert found.total_nbytes == whole.total_nbytes
    assert "it does more with its blocks" in found.notes[0] and not whole.notes


@on_mlx
def test_a_real_step_is_measured_recorded_and_made_of_the_same_parts():
    module, _ = tiny()
    forecast = Forecast(module, "tiny", None, True)
    setup = Setup(None, LoRAConfig(rank=4), TrainConfig(**TRAIN))
    found = forecast.estimate(setup, MACHINE, "measured")
    assert (
        found.level == "measured" and found.measured_peak == found.total_nbytes == found.high_nbytes
    )
    assert len(record.path().read_text().splitlines()) == 1
    assert found.exact_nbytes == sum(forecast.inputs(setup).values())


@on_mlx
def test_what_else_is_in_memory_is_not_measured():
    import mlx.core as mx

    module, _ = tiny()
    setup = Setup(None, LoRAConfig(rank=4), TrainConfig(**TRAIN, grad_checkpoint=True))
    alone = max(measured_peak(module, setup) for _ in range(2))
    other = mx.ones(2_000_000)
    mx.eval(other)
    assert measured_peak(module, setup) == pytest.approx(alone, rel=0.1)


@on_mlx
def test_a_step_that_would_not_fit_is_not_run():
    module, _ = tiny()
    forecast = Forecast(module, "tiny", None, True)
    small = replace(MACHINE, free_nbytes=1_000_000)
    with pytest.raises(ConfigError, match="would need"):
        forecast.estimate(Setup(None, LoRAConfig(rank=4), TrainConfig(**TRAIN)), small, "measured")
    with pytest.raises(ConfigError, match="weights"):
        Forecast(module, "tiny").estimate(Setup(), MACHINE, "measured")


@on_mlx
def test_formulas_are_made_once_for_a_kind_of_step():
    forecast = Forecast(skeleton(settings("llama", num_hidden_layers=6)), "tiny")
    for length, rank in ((96, 4), (80, 8), (128, 2)):
        plan = QuantPlan(QuantConfig())
        train = TrainConfig(batch_size=2, max_seq_length=length, loss_chunk=512)
        forecast.by_formula(Setup(plan, LoRAConfig(rank=rank), train))
    assert len(forecast._formulas) == 1


def test_a_70b_model_is_predicted_within_seconds_and_in_little_memory():
    done = subprocess.run([sys.executable, "-c", BIG], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    yardstick_s, *levels, memory = done.stdout.splitlines()
    (one, first, formula_s), (two, second, traced_s) = (line.split() for line in levels)
    assert (first, second) == ("formula", "traced") and int(one) == pytest.approx(
        int(two), rel=0.01
    )
    # 0.3 s on two quiet cores, so 3 and 15 s there; the first formula imports mlx-lm, too
    assert float(formula_s) < 10 * float(yardstick_s)
    assert float(traced_s) < 50 * float(yardstick_s)
    assert int(memory) < 500e6


@pytest.mark.parametrize("setting, expected", [("8", 8), ("", 27), ("many", 27), ("0", 27)])
def test_mlx_own_setting_of_work_in_flight_counts_on_a_gpu(setting, expected, monkeypatch):
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", setting)
    monkeypatch.setattr(trace, "backend", lambda: "cuda")
    assert trace.runahead().dispatches == 11 * expected
    monkeypatch.setattr(trace, "backend", lambda: "cpu")
    assert trace.runahead().dispatches == 110


@on_mlx
def test_without_a_compiler_nothing_is_fused(monkeypatch):
    forecast = Forecast(skeleton(settings("llama")), "tiny")
    setup = Setup(None, LoRAConfig(rank=4), TrainConfig(**TRAIN, grad_checkpoint=True))
    fused = forecast.graph(setup)
    monkeypatch.setattr(read_graph.shutil, "which", lambda _: None)
    plain = forecast.graph(setup)
    assert any(node.name == "Compiled" for node in fused.nodes)
    assert not any(node.name == "Compiled" for node in plain.nodes)
