"""Merging: the same function as the unmerged model where that is promised, and a preview that says what is lost elsewhere."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import qlab
from qlab.core.config.quant import QuantConfig
from qlab.core.adapt.retention import RetentionReport
from qlab.core.config.lora import LoRAConfig
from qlab.engine.adapt.parameters import expected
from qlab.engine.adapt.attach import twin_with
from qlab.engine.quantize.quantize import quantized_layer
from qlab.engine.io.save import save
from qlab.engine.adapt.fuse import change
from qlab.engine.adapt.fuse import fuse
from qlab.engine.adapt.preview import preview
import qlab.views  # noqa: F401  # reports show themselves
from qlab.runtime.job import mlx_call
from qlab.nn.linear import weight_of
from qlab.engine.models.skeleton import describe
from qlab.engine.models.surgery import module_at
from qlab.errors import ConfigError
from qlab.errors import UnsupportedError
from qlab.errors import WeightsError
from tests.tiny import on_mlx, quantized, tiny

TOKENS = mx.array([[5, 10, 7, 90, 33, 2]])
BASES = [
    None,
    QuantConfig("affine", 4),
    QuantConfig("affine", 3),
    QuantConfig("mxfp4"),
    QuantConfig("nf4"),
]


def label(value) -> str:
    return value.label if isinstance(value, QuantConfig) else str(value)


def done(work):
    """Run a generator to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def stirred(module, spec, lora: LoRAConfig, size: float = 0.3) -> dict[str, mx.array]:
    """Parameters of an adapter whose change is so large, relative to the weight."""
    made = {}
    for number, layer in enumerate(lora.targets(spec)):
        shapes = lora.adapter_kind.shapes(layer.shape, lora.rank, layer.kind)
        keys = [mx.random.key(7 * number + i) for i in range(3)]
        weight = weight_of(module_at(module, layer.path), mx.float32)
        own = {
            name: mx.random.normal(shapes[name], key=k)
            for name, k in zip(("lora_a", "lora_b"), keys, strict=False)
        }
        factors = (
            (own["lora_b"], own["lora_a"])
            if layer.kind == "switch"
            else (own["lora_a"], own["lora_b"])
        )
        product = lora.scale * (factors[0] @ factors[1])
        own["lora_b"] = own["lora_b"] * (size * mx.linalg.norm(weight) / mx.linalg.norm(product))
        if "m" in shapes:
            lengths = mx.linalg.norm(weight, axis=-1)
            own["m"] = lengths * (1 + 0.2 * size * mx.random.normal(shapes["m"], key=keys[2]))
        made |= {f"{layer.path}.{name}": array for name, array in own.items()}
    mx.eval(made)
    return made


def far(a: mx.array, b: mx.array) -> float:
    """Largest difference of logits, relative to their spread."""
    return (mx.abs(a - b).max() / mx.sqrt(mx.var(b))).item()


@pytest.mark.parametrize("tied", ["llama", "llama tied"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", BASES, ids=label)
@on_mlx
def test_fused_dense_the_model_says_what_it_says_with_the_adapter_beside_it(base, kind, tied):
    module, spec = tiny(tied)
    module = quantized(module, spec, base)
    spec = describe(module, "tiny")
    lora = LoRAConfig(rank=4, kind=kind, keys=("all-linear", "embed_tokens"))
    parameters = stirred(module, spec, lora)
    wanted = twin_with(module, spec, lora, parameters)(TOKENS)
    made = done(fuse(module, spec, parameters, lora))
    # mxfp4 does not keep the dtype that the weights had, so they become bfloat16 in this float32 model
    assert far(made(TOKENS), wanted) < (0.05 if base and base.mode == "mxfp4" else 1e-3)
    assert far(module(TOKENS), wanted) > 0.1
    assert all("scales" not in module_at(made, layer.path) for layer in lora.targets(spec))
    assert type(module_at(made, "model.embed_tokens")) is nn.Embedding


@on_mlx
def test_biases_are_kept_and_layers_without_adapter_stay_or_become_dense_as_told():
    module, spec = tiny("qwen2")
    module = quantized(module, spec, QuantConfig("affine", 4))
    spec = describe(module, "tiny")
    q, up = "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj"
    module_at(module, q).bias = mx.arange(64) * 0.01
    lora = LoRAConfig(rank=4, keys="q_proj", num_layers=1)
    parameters = stirred(module, spec, lora)
    wanted = twin_with(module, spec, lora, parameters)(TOKENS)
    some, whole = (done(fuse(module, spec, parameters, lora, rest=rest)) for rest in ("base", 16))
    assert far(some(TOKENS), wanted) < 1e-3 and far(whole(TOKENS), wanted) < 1e-3
    assert mx.array_equal(module_at(some, q).bias, module_at(module, q).bias)
    assert (
        module_at(some, up) is not None
        and "scales" in module_at(some, up)
        and "scales" not in module_at(whole, up)
    )
    assert "scales" in module_at(module, q), "the base is not changed"


@on_mlx
def test_eight_bits_and_the_bases_own_storage_store_the_adapted_layers_so():
    module, spec = tiny()
    module = quantized(module, spec, QuantConfig("mxfp4"))
    spec = describe(module, "tiny")
    lora = LoRAConfig(rank=4)
    parameters = stirred(module, spec, lora)
    path = "model.layers.1.mlp.down_proj"
    eight, same = (done(fuse(module, spec, parameters, lora, bits=bits)) for bits in (8, "base"))
    assert describe(eight, "x")[path].storage_label == "affine 8-bit g64"
    assert describe(same, "x")[path].storage_label == spec[path].storage_label == "mxfp4 4-bit g32"
    assert describe(eight, "x")["lm_head"].storage_label == "mxfp4 4-bit g32", "it has no adapter"
    wanted = twin_with(module, spec, lora, parameters)(TOKENS)
    assert far(eight(TOKENS), wanted) < 0.15 < far(same(TOKENS), wanted)


@on_mlx
def test_onto_the_original_adds_the_same_change_to_the_weights_before_quantization():
    first, spec = tiny()
    module = quantized(first, spec, QuantConfig("affine", 3))
    spec = describe(module, "tiny")
    for kind in ("lora", "dora"):
        lora = LoRAConfig(rank=4, kind=kind, keys=("down_proj",))
        parameters = stirred(module, spec, lora, 0.05)
        made = done(fuse(module, spec, parameters, lora, onto="original", original=first, rest=16))
        path = "model.layers.0.mlp.down_proj"
        own = {name: parameters[f"{path}.{name}"] for name in lora.adapter_kind.shapes((1, 1), 1)}
        delta = change(module_at(module, path), "linear", lora, own)
        assert mx.allclose(
            module_at(made, path).weight - module_at(first, path).weight, delta, atol=1e-6
        )
    assert far(made(TOKENS), first(TOKENS)) > 1e-3
    plain = module_at(made, "model.layers.0.mlp.up_proj").weight
    assert mx.array_equal(plain, module_at(first, "model.layers.0.mlp.up_proj").weight), (
        "rest=16 is the original too"
    )


# retention by size of the change: dequantized base, original base, 8 bits (a 1024² Gaussian, rank 16)
TABLE = {0.01: (0.16, 0.99, 0.997), 0.03: (0.11, 0.99, 0.999), 0.10: (0.79, 1.00, 1.00)}


@pytest.mark.parametrize("size", TABLE)
@on_mlx
def test_preview_finds_the_dead_zone_of_four_bits(size):
    mx.random.seed(1)
    first = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    first.layers[0].weight = (mx.random.normal((1024, 1024)) * 0.02).astype(mx.bfloat16)
    module = nn.Sequential(
        quantized_layer(first.layers[0], "x", QuantConfig("affine", 4), "rtn", None)
    )
    spec = describe(module, "one layer")
    lora = LoRAConfig(rank=16, keys="layers.0")
    found = done(preview(module, spec, stirred(module, spec, lora, size), lora, first))
    base, original, eight = TABLE[size]
    layer = found.layers[0]
    assert layer.relative_size == pytest.approx(size, rel=0.01)
    assert found.retained("base") == pytest.approx(base, abs=0.05)
    assert found.retained("base_from_original") == pytest.approx(original, abs=0.02)
    assert found.retained("8") == pytest.approx(eight, abs=0.01)
    assert found.retained("16") == pytest.approx(1, abs=0.01)
    assert layer.error_ratio == pytest.approx(0.091 / size, rel=0.05)
    assert 0 < layer.codes_changed < 0.5
    assert any("Cheapest fix: bits=8" in note for note in found.notes)


@on_mlx
def test_rows_that_speak_for_all_of_a_large_layer_say_nearly_the_same(monkeypatch):
    module, spec = tiny(hidden_size=256, intermediate_size=1024)
    base = quantized(module, spec, QuantConfig("affine", 4))
    spec = describe(base, "tiny")
    lora = LoRAConfig(rank=4)
    parameters = stirred(base, spec, lora, 0.05)
    monkeypatch.setattr("qlab.engine.adapt.preview._SAMPLE", 2**16)
    some, whole = (
        done(preview(base, spec, parameters, lora, module, exact=exact)) for exact in (False, True)
    )
    assert {layer.depth for layer in some.layers} == {"exact", "sampled"} and {
        x.depth for x in whole.layers
    } == {"exact"}
    for target in ("8", "base", "base_from_original"):
        assert some.retained(target) == pytest.approx(whole.retained(target), abs=0.03)
    for a, b in zip(some.layers, whole.layers, strict=True):
        assert a.relative_size == pytest.approx(b.relative_size, rel=0.2)
        assert a.delta_norm == pytest.approx(b.delta_norm, rel=0.2)


@on_mlx
def test_codes_changed_counts_codes_of_any_width():
    from qlab.engine.adapt.preview import _differing

    for bits in (2, 3, 4, 5, 6, 8):
        config = QuantConfig("affine", bits)
        codes = np.random.default_rng(bits).integers(0, 2**bits, (4, 64))
        other = codes.copy()
        other[1, 3:20] ^= 1
        packed = []
        for values in (codes, other):
            weight = mx.array(values.astype(np.float32))
            weight[:, 0], weight[:, 1] = (
                0,
                2**bits - 1,
            )  # the range of every group, so that codes are the values
            packed.append(config.scheme.quantize(weight, config)["weight"])
        assert _differing(*packed, bits) == 17 / 256


@on_mlx
def test_a_fresh_adapter_and_an_unquantized_base_are_said_as_what_they_are():
    module, spec = tiny()
    lora = LoRAConfig(rank=4, keys="q_proj")
    parameters = {path: mx.zeros(shape) for path, shape in expected(spec, lora).items()}
    found = done(preview(module, spec, parameters, lora))
    assert "nothing to lose" in found.notes[0] and np.isnan(found.retained("base"))
    found = done(preview(module, spec, stirred(module, spec, lora, 0.02), lora))
    assert found.retained("base") == found.retained("16") == pytest.approx(1, abs=1e-3)
    assert not found.notes


@on_mlx
def test_the_report_reads_as_text_table_and_html():
    module, spec = tiny()
    module = quantized(module, spec, QuantConfig("affine", 4))
    spec = describe(module, "a <b>")
    found = done(
        preview(module, spec, stirred(module, spec, LoRAConfig(rank=4), 0.01), LoRAConfig(rank=4))
    )
    assert (
        isinstance(found, RetentionReport)
        and "affine 4-bit g64" in repr(found)
        and "base " in repr(found)
    )
    frame = found.to_pandas()
    assert (
        len(frame) == 21 and frame.kept_base.between(-0.5, 0.9).all() and frame.kept_8.gt(0.9).all()
    )
    page = found._repr_html_()
    assert "a &lt;b&gt;" in page and page.count("<tr>") == 3 + 1 + 12
    worst = found.worst(3)
    assert [x.kept_base for x in worst] == sorted(frame.kept_base)[:3]
    with pytest.raises(ConfigError, match="choose one of 16, 8, base"):
        found.retained("4")


@on_mlx
def test_options_that_are_not_legal_are_refused_and_name_what_is():
    module, spec = tiny()
    lora = LoRAConfig(rank=4)
    parameters = stirred(module, spec, lora)
    for options, words in [
        ({"bits": 4}, "bits=4 is not legal; choose one of 16, 8, 'base'"),
        ({"bits": True}, "bits=True"),
        ({"onto": "first"}, "'base', 'original'"),
        ({"rest": 8}, "rest=8"),
        ({"onto": "original"}, "needs the model before quantization"),
    ]:
        with pytest.raises(ConfigError, match=words):
            done(fuse(module, spec, parameters, lora, **options))
    with pytest.raises(ConfigError, match="missing"):
        done(fuse(module, spec, dict(list(parameters.items())[1:]), lora))
    with pytest.raises(WeightsError, match="NaN"):
        done(
            preview(
                module, spec, {path: array * mx.nan for path, array in parameters.items()}, lora
            )
        )
    with pytest.raises(WeightsError, match="merged weight of 'model.layers.0"):
        done(fuse(module, spec, {path: array * 1e25 for path, array in parameters.items()}, lora))


@on_mlx
def test_a_kind_that_does_not_say_what_it_adds_says_that_it_cannot_be_fused(monkeypatch):
    from qlab import registry
    from qlab.adapters.lora import LoRA
    from qlab.core.config.lora import AdapterKind

    class Other(LoRA):
        name = "other"
        change = AdapterKind.change

    monkeypatch.setitem(registry.shelf("adapters"), "other", Other())
    module, spec = tiny()
    lora = LoRAConfig(rank=4, kind="other")
    with pytest.raises(UnsupportedError, match="kind='other'"):
        done(fuse(module, spec, stirred(module, spec, lora), lora))


@pytest.mark.parametrize("bits", [16, 8, "base"])
def test_a_fused_folder_opens_in_stock_mlx_lm_with_the_same_logits(bits, tmp_path):
    model = qlab.load("demo")
    base = qlab.Quantizer(model, bits=4).quantize()
    lora = LoRAConfig(rank=4, keys=("all-linear", "embed_tokens"))

    def make():
        made = done(
            fuse(
                base.module, base.spec, stirred(base.module, base.spec, lora, 0.1), lora, bits=bits
            )
        )
        said = save(tmp_path / "fused", made, model.tokenizer, model.config, None)
        return np.array(made(TOKENS).astype(mx.float32)), said

    logits, said = mlx_call(make)
    assert said.startswith("Saved as an mlx-lm folder")

    def stock():
        import mlx_lm

        module, _ = mlx_lm.load(str(tmp_path / "fused"))
        return np.array(module(TOKENS).astype(mx.float32))

    assert np.array_equal(mlx_call(stock), logits)
