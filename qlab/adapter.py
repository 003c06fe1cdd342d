"""``Adapter``: small trainable changes of a frozen model, chosen by traits, sliders or code. Wiring only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import traitlets as T

from qlab import registry
from qlab.core.adapter_panel import AdapterReport, AdapterState, report_of
from qlab.core.config import QuantPlan
from qlab.core.training import LoRAConfig
from qlab.engine import adapt
from qlab.engine.job import Latest, mlx_call
from qlab.engine.memory import generate as _generate
from qlab.engine.survey import Survey
from qlab.errors import ConfigError
from qlab.model import Model
from qlab.quantizer import Quantizer
from qlab.views.adapter import AdapterPanel
from qlab.views.adapter_text import html, page, text_line

AUTO_SIZE = 1e9  # parameters up to which a panel measures starts without being asked
_SHAPED_BY = ("kind", "rank", "keys", "num_layers", "init", "dtype")  # what parameters belong to


class Adapter(T.HasTraits):
    """Small trainable changes of a frozen model. As the last line of a cell it is a panel.

    The traits and the sliders are one state in both directions. The model itself never changes.

    Args:
        source: a model, or a ``Quantizer``: then its quantized model is adapted, and follows its sliders until the adapter
            is trained.
        kind: a kind on the shelf: ``lora`` or ``dora``.
        rank: inner width of the two factors.
        alpha: scale × rank (with ``rslora`` scale × √rank); give alpha or scale. The default is 2 × rank.
        scale: factor before the product of the factors.
        dropout: share of the adapter's inputs set to zero while training.
        keys: layers to adapt: names, ends of paths, patterns, ``all-linear``; None is every linear layer in the blocks.
        num_layers: blocks that get adapters, counted from the last; −1 means all.
        init: ``default`` changes nothing at first; ``residual``, ``diagonal`` and ``qera`` make up for the quantization error.
        rslora: whether alpha is divided by √rank instead of the rank.
        dtype: of the factors: ``float32`` or ``bfloat16``.
        text: for ``diagonal`` and ``qera``; a path, a string, rows, or a ``datasets`` set. None is the embedded text.
        seed: of what is drawn.

    Raises:
        ConfigError: a setting is not legal or does not fit the model.
        LayerNotFoundError: a key matches no layer; names the nearest.
    """

    _TRAITS = ("kind", "rank", "scale", "dropout", "keys", "num_layers", "init", "rslora")
    kind = T.Unicode("lora")
    rank = T.Int(8)
    scale = T.Float(2.0)
    dropout = T.Float(0.0)
    keys = T.Any(None)
    num_layers = T.Int(-1)
    init = T.Unicode("default")
    rslora = T.Bool(False)

    def __init__(
        self, source: Model | Quantizer, kind: str = "lora", rank: int = 8, alpha: float | None = None,
        scale: float | None = None, dropout: float = 0.0, keys: Any = None, num_layers: int = -1, init: str = "default",
        rslora: bool = False, dtype: str = "float32", text: Any = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if not isinstance(source, (Model, Quantizer)):
            raise ConfigError(f"source={source!r} is not legal; give a model or a Quantizer.")
        if alpha is not None and scale is not None:
            raise ConfigError(f"alpha={alpha!r} and scale={scale!r} say the same thing twice; give one of them.")
        first = LoRAConfig(rank, 2.0 if scale is None else scale, dropout, num_layers, keys, kind, dtype, rslora, init)
        first = first if alpha is None else first.with_alpha(alpha)
        self._quantizer = source if isinstance(source, Quantizer) else None
        self._model = source.model if isinstance(source, Quantizer) else source
        self._spec, self._dtype, self.seed = self._model.spec, dtype, seed
        self._lock = threading.RLock()
        self._jobs = Latest(self._show)
        self._panel: AdapterPanel | None = None
        self._ack: int | None = None
        self._bases: dict[Any, Model] = {}
        self._pinned: tuple[Any, Model] | None = None
        self._held: tuple[Any, dict[str, Any]] | None = None
        self._twin: tuple[Any, Any] | None = None
        self._off = self._count = 0
        self.origin = ""
        self._survey = Survey(self._model.study, self._model.tokenizer, text)
        self._allow(first)
        super().__init__()
        self._take(first)
        self.observe(self._on_trait, list(self._TRAITS))
        if self._quantizer is not None:
            self._quantizer.observe(self._on_source, ["mode", "bits", "group_size", "solver"])

    # --- the choice -------------------------------------------------------------------------------------------------

    @property
    def config(self) -> LoRAConfig:
        """The adapter as a value; its repr pastes back."""
        return LoRAConfig(dtype=self._dtype, **{name: getattr(self, name) for name in self._TRAITS})

    @property
    def alpha(self) -> float:
        """Scale × rank; with ``rslora`` scale × √rank. A change of the rank leaves the scale."""
        return self.config.alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.scale = self.config.with_alpha(value).scale

    @property
    def code(self) -> str:
        """The Python that rebuilds this adapter."""
        return self.state().code

    # --- the models -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """What was given: the model, or the quantizer's."""
        return self._model

    @property
    def plan(self) -> QuantPlan | None:
        """Storage of the base; None if it stays as it came."""
        return self._key()[0]

    @property
    def base(self) -> Model:
        """The frozen model that is adapted; a quantizer's plan is carried out at first use. Blocks."""
        if self._pinned is not None:
            return self._pinned[1]
        key = self._key()
        if key not in self._bases:
            made = self._model if self._quantizer is None else self._quantizer.quantize()
            self._bases = {key: made}  # one at a time: it is as large as the model
        return self._bases[key]

    @property
    def original(self) -> Model | None:
        """The model before it was quantized; None if that is not known."""
        if self._quantizer is None and any(layer.stored for layer in self._spec.layers):
            return None
        return self._model

    # --- the parameters ---------------------------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        """The trainable arrays by path, evaluated; made at first use. Blocks."""
        key = self._layout()
        held = self._held
        if held is None or held[0] != key:
            base, lora = self.base, self.config
            if lora.init == "default":
                made = mlx_call(adapt.fresh, base.module, base.spec, lora, self.seed)
            else:
                self._check_start(lora)
                made = self._jobs.run(lambda: self._survey.compensate(base.module, lora))
            held = self._held = (key, made)
        return dict(held[1])

    def set_parameters(self, parameters: Mapping[str, Any], origin: str) -> None:
        """Take trained arrays; all or none.

        Args:
            parameters: by path, as ``parameters`` has them.
            origin: where they come from, in words.

        Raises:
            ConfigError: other paths or shapes than the adapter's.
            WeightsError: a number is NaN or infinite.
        """
        base = self.base
        made = mlx_call(adapt.checked, parameters, adapt.expected(base.spec, self.config))
        with self._lock:
            self._pinned, self.origin, self._count = (self._key(), base), origin, self._count + 1
            self._held = (self._layout(), made)

    @property
    def version(self) -> int:
        """Rises with every change of the parameters."""
        return self._count

    @property
    def trained(self) -> bool:
        """Whether the parameters are other than those it starts with."""
        return bool(self.origin)

    def reset(self) -> None:
        """Go back to the start: trained parameters are dropped, and a quantizer's sliders count again."""
        with self._lock:
            self._pinned = self._held = self._twin = None
            self.origin, self._count = "", self._count + 1
        self._refresh()

    def remove(self) -> Model:
        """Drop the adapter's arrays and return the base, which never changed."""
        base = self.base
        self.reset()
        self._bases = {}
        return base

    # --- in use -----------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[Model]:
        """Within, ``module`` and ``generate`` use the bare base."""
        with self._lock:
            self._off += 1
        try:
            yield self.base
        finally:
            with self._lock:
                self._off -= 1

    @property
    def module(self) -> Any:
        """The base with the adapter, ready to run (mlx-lm's model); the bare base while disabled. Blocks."""
        base = self.base
        if self._off:
            return base.module
        parameters, lora = self.parameters, self.config
        key, twin = (self._layout(), lora.scale, self._count), self._twin
        if twin is None or twin[0] != key:
            twin = self._twin = (key, mlx_call(adapt.twin_with, base.module, base.spec, lora, parameters))
        return twin[1]

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the adapted model's most likely continuation (its answer, if it has a chat template)."""
        return mlx_call(_generate, self.module, self._model.tokenizer, prompt, max_tokens)

    # --- what a rank recovers ---------------------------------------------------------------------------------------

    @property
    def report(self) -> AdapterReport:
        """The adapter, layer by layer, with what has been measured; ``measure`` measures it."""
        return report_of(self._spec, self.config, self._survey.found(self._key())[0])

    def measure(self, text: bool = True) -> AdapterReport:
        """Measure how much of the quantization error each rank recovers; blocks.

        Args:
            text: whether also on the layers' outputs, for which two texts pass the model.

        Raises:
            ConfigError: nothing is quantized, or no original is known.
        """
        if obstacle := self._obstacle():
            raise ConfigError(obstacle)
        self._jobs.run(lambda: self._work(text))
        return self.report

    # --- the panel --------------------------------------------------------------------------------------------------

    @property
    def widget(self) -> Any:
        """The live panel; the first one starts to measure."""
        with self._lock:
            if self._panel is None:
                self._panel = AdapterPanel(self.state(), self._on_intent)
                self._refresh()
            return self._panel.widget

    def state(self) -> AdapterState:
        """What the panel shows now, as a value."""
        found, stale = self._survey.found(self._key())
        plan, optimizer = self.plan, registry.get("optimizers", "adamw")
        lora = self.config
        return AdapterState(
            spec=self._spec,
            config=lora,
            storage=plan.default.label if plan else next((x.stored for x in self._spec.layers if x.stored), "16-bit"),
            kinds=tuple((k.name, k.title, k.adapts) for k in registry.shelf("adapters").values()),
            recoveries=found,
            stale=stale,
            obstacle=self._obstacle(),
            origin=self.origin,
            optimizer=("AdamW", optimizer.state_nbytes((1000,), lora.itemsize) / 1000),
            progress=self._jobs.progress,
            error=self._jobs.error,
            source="q" if self._quantizer is not None else "model",
        )

    def to_html(self, path: str) -> str:
        """Write one self-contained file in which the sliders still work, offline and without a kernel; return its path."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(self.state()))
        return path

    def close(self) -> None:
        """End the running job and the panel, and stop to follow the quantizer."""
        self._jobs.stop()
        if self._quantizer is not None:
            self._quantizer.unobserve(self._on_source, ["mode", "bits", "group_size", "solver"])
        if self._panel is not None:
            self._panel.close()
            self._panel = None

    def __repr__(self) -> str:
        return text_line(self.state())

    def _repr_html_(self) -> str:
        return html(self.state())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **_: Any) -> Any:
        bundle = self.widget._repr_mimebundle_()
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        state = self.state()
        return {**data, "text/plain": text_line(state), "text/html": html(state)}, metadata

    def _display_(self) -> Any:  # marimo
        return self.widget

    # --- within -----------------------------------------------------------------------------------------------------

    @T.validate(*_TRAITS)
    def _valid(self, proposal: Any) -> Any:
        changed = replace(self.config, **{proposal["trait"].name: proposal["value"]})
        self._allow(changed)
        return getattr(changed, proposal["trait"].name)

    def _allow(self, config: LoRAConfig) -> None:
        """Refuse a config that does not fit the model, or that the trained parameters do not fit."""
        config.targets(self._spec)
        self._check_start(config)
        if self.origin and (lost := [name for name in _SHAPED_BY if getattr(config, name) != self._held[0][name]]):
            raise ConfigError(f"Another {lost[0]} would lose the parameters ({self.origin}); call reset() first.")

    def _check_start(self, config: LoRAConfig) -> None:
        if config.init != "default" and (obstacle := self._obstacle()):
            raise ConfigError(f"init={config.init!r} is not possible: {obstacle}")

    def _obstacle(self) -> str:
        if self._quantizer is not None:
            return ""
        if self.original is None:
            return "The model came quantized and its original weights are not known; give Adapter the Quantizer."
        return "The model is not quantized, so there is no error to make up for; give Adapter a Quantizer."

    def _take(self, config: LoRAConfig) -> None:
        with self.hold_trait_notifications():
            for name in self._TRAITS:
                setattr(self, name, getattr(config, name))

    def _key(self) -> tuple[QuantPlan | None, str]:
        """Storage of the base: what it was trained on, or what is chosen now."""
        if self._pinned is not None:
            return self._pinned[0]
        return (self._quantizer.plan, self._quantizer.solver) if self._quantizer is not None else (self._model.plan, "")

    def _layout(self) -> Any:
        """What a set of parameters belongs to."""
        config = self.config
        shaped = {name: getattr(config, name) for name in _SHAPED_BY}
        return shaped if self.origin or config.init == "default" else {**shaped, "of": self._key(), "scale": config.scale}

    def _work(self, outputs: bool) -> Any:
        return self._survey.measure(self._key(), self.config, outputs)

    def _refresh(self) -> None:
        """Measure anew in the background if somebody looks."""
        if self._panel is not None and not self._obstacle():
            self._jobs.start(lambda: self._work(self._spec.size <= AUTO_SIZE))
        self._show()

    def _on_trait(self, change: Any) -> None:
        if change["name"] in ("keys", "kind", "num_layers"):
            self._refresh()
        self._show()

    def _on_source(self, change: Any) -> None:
        if self._pinned is None:
            self._refresh()

    def _show(self) -> None:
        with self._lock:  # called by cells, widgets and jobs: an older state must not overtake a newer one
            if self._panel is not None:
                self._panel.show(self.state(), self._ack)

    def _on_intent(self, intent: dict[str, Any]) -> None:
        """Do what the browser asks; called on a widget thread, so work is only queued."""
        self._ack = intent["seq"]
        if intent["op"] == "set":
            wanted = replace(self.config, **intent["config"])
            self._allow(wanted)
            self._take(wanted)
        elif intent["op"] == "measure":
            self._jobs.start(lambda: self._work(True))
        elif intent["op"] == "cancel":
            self._jobs.stop()
        elif intent["op"] == "reset":
            self.reset()
        self._show()
