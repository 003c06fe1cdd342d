"""Models call qlab's functions in the place of mlx-lm's while a step is computed, and mlx-lm's own again behind."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qlab.ops import swiglu as activation
from qlab.engine.step import patches
from qlab.engine.step.patches import patched
from qlab.engine.step.patches import call_sites
from tests.tiny import on_mlx, tiny


@on_mlx
def test_models_call_them_within_and_mlx_lms_own_again_behind_also_after_an_error():
    from mlx_lm.models import llama
    from mlx_lm.models.activations import swiglu as stock

    module, _ = tiny()
    found = call_sites(module)
    assert (llama, "swiglu", activation.swiglu) in found
    with pytest.raises(RuntimeError), patched(found):
        assert llama.swiglu is activation.swiglu
        inside = module(mx.array([[1, 2, 3]]))
        raise RuntimeError
    assert llama.swiglu is stock
    assert mx.allclose(module(mx.array([[1, 2, 3]])), inside, atol=1e-5)


@on_mlx
def test_a_model_without_a_gated_activation_keeps_its_own():
    assert "swiglu" not in [name for _, name, _ in call_sites(tiny(model_type="gemma2")[0])]


@pytest.mark.parametrize("device, within", [(mx.cpu, True), (mx.gpu, False)], ids=["cpu", "gpu"])
@on_mlx
def test_without_a_gradient_they_are_of_use_on_a_cpu_only(device, within, monkeypatch):
    from mlx_lm.models import llama

    found = call_sites(tiny()[0])
    monkeypatch.setattr(patches.mx, "default_device", lambda: device)
    with patched(found, forward=True):
        assert (llama.swiglu is activation.swiglu) == within
    with patched(found):
        assert llama.swiglu is activation.swiglu
