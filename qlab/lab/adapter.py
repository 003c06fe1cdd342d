"""``Adapter``: small trainable changes of a frozen model, chosen by traits, sliders or code.

Wiring only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qlab.core.adapt.report import AdapterReport, report_of
from qlab.core.adapt.retention import Survival
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.panels.adapter import NO_ORIGINAL, NOT_QUANTIZED, AdapterState
from qlab.engine.adapt import parameters as adapt
from qlab.engine.adapt.attach import twin_with
from qlab.engine.adapt.files import load_adapter, save_adapter
from qlab.engine.adapt.fuse import fuse, preview
from qlab.engine.adapt.recovery import Survey
from qlab.engine.evaluate.generate import reply
from qlab.engine.io.loaded import Loaded
from qlab.errors import BusyError, ConfigError, named, sealed
from qlab.lab.adapter_arrays import Held
from qlab.lab.adapter_traits import TRAITS, AdapterChoice
from qlab.lab.model import Model
from qlab.lab.panel import HasPanel, PanelViews
from qlab.lab.quantizer import Quantizer
from qlab.runtime.job import Latest, mlx_call
from qlab.views.adapter.static import html, page, text_line
from qlab.views.adapter.widget import AdapterPanel

AUTO_SIZE = 1e9  # parameters up to which a panel measures starts without being asked
_STORED_BY = ["mode", "bits", "group_size", "solver", "overrides"]  # a quantizer's traits


@named
@sealed
class Adapter(HasPanel, AdapterChoice):
    """Small trainable changes of a frozen model. As the last line of a cell it is a panel.

    The traits and the sliders are one state in both directions. The model itself never changes.

    Args:
        source: a model, or a ``Quantizer``: then its quantized model is adapted, and follows its
            sliders until the adapter is trained.
        kind: on the shelf of adapters; this and what follows is as in ``LoRAConfig``.
        rank: inner width of the change.
        alpha: scale × rank (with ``rslora`` scale × √rank); give alpha or scale. The default is 2 ×
            rank.
        scale: factor of the change.
        dropout: share of the adapter's inputs that a training step drops.
        keys: layers to adapt, by name or glob; None is every linear layer, those of experts too.
        num_layers: last blocks to adapt; −1 is all.
        init: how the change begins.
        rslora: whether alpha is divided by √rank instead of rank.
        dtype: of the adapter's numbers.
        text: for ``diagonal`` and ``qera``; a path, a string, rows, or a ``datasets`` set. None is
            the embedded text.
        seed: of what is drawn.

    Raises:
        ConfigError: a setting is not legal or does not fit the model.
        LayerNotFoundError: a key matches no layer; names the nearest.
    """

    _views = PanelViews(panel=AdapterPanel, text_line=text_line, html=html, page=page)

    def __init__(
        self,
        source: Model | Quantizer,
        kind: str = "lora",
        rank: int = 8,
        alpha: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        keys: Any = None,
        num_layers: int = -1,
        init: str = "default",
        rslora: bool = False,
        dtype: str = "float32",
        text: Any = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(source, (Model, Quantizer)):
            raise ConfigError(f"source={source!r} is not legal; give a model or a Quantizer.")
        first = LoRAConfig(rank, 2.0, dropout, num_layers, keys, kind, dtype, rslora, init).scaled(
            alpha, scale
        )
        super().__init__()
        self._quantizer = source if isinstance(source, Quantizer) else None
        self._model = source.model if isinstance(source, Quantizer) else source
        self._spec = self._model.spec
        self._held = Held()
        self._bases: dict[Any, Model] = {}
        self._off = 0  # how many ask for the bare base
        self._jobs = Latest(self._show)
        self.seed = seed
        self.run = ""  # name of the run that trains it now
        self.notes: tuple[str, ...] = ()  # what to know about the folder it came from
        self._survey = Survey(self._model.study, self._model.tokenizer, text)
        self._take(first)
        self.observe(self._on_trait, list(TRAITS))
        if self._quantizer is not None:
            self._quantizer.observe(self._on_source, _STORED_BY)

    @property
    def code(self) -> str:
        """The Python that rebuilds this adapter."""
        return self.state().code

    # --- the models -------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """What was given: the model, or the quantizer's."""
        return self._model

    @property
    def quantizer(self) -> Quantizer | None:
        """Whose sliders the base follows.

        None if there are none, or once the adapter is held on what it was trained on.
        """
        return self._quantizer if self._held.pinned is None else None

    @property
    def plan(self) -> QuantPlan | None:
        """Storage of the base; None if it stays as it came."""
        return self._key()[0]

    @property
    def base(self) -> Model:
        """The frozen model that is adapted; a quantizer's plan is carried out at first use. Blocks."""
        if self._held.pinned is not None:
            return self._held.pinned[1]
        key = self._key()
        if key not in self._bases:
            made = self._model if self._quantizer is None else self._quantizer.quantize()
            self._bases = {key: made}  # one at a time: it is as large as the model
        return self._bases[key]

    @property
    def original(self) -> Model | None:
        """The model before it was quantized; None if that is not known."""
        return None if self._quantizer is None and self._spec.stored else self._model

    # --- the parameters ---------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        """The trainable arrays by path, evaluated; made at first use. Blocks."""
        return self._held.arrays(self.config, self._key(), self._start)

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
            self._held.take(made, self.config, (self._key(), base), origin)
        self._show()

    @property
    def version(self) -> int:
        """Rises with every change of the parameters."""
        return self._held.version

    @property
    def origin(self) -> str:
        """Where trained parameters come from, in words; empty until there are some."""
        return self._held.origin

    @property
    def trained(self) -> bool:
        """Whether the parameters are other than those it starts with."""
        return bool(self.origin)

    def reset(self) -> None:
        """Go back to the start.

        Trained parameters are dropped, and a quantizer's sliders count again.

        Raises:
            BusyError: a run trains it.
        """
        if self.run:
            raise BusyError(f"The run {self.run!r} trains this adapter; stop it first.")
        with self._lock:
            self._held.drop()
        self._refresh()

    def remove(self) -> Model:
        """Drop the adapter's arrays and return the base, which never changed."""
        base = self.base
        self.reset()
        self._bases = {}
        return base

    # --- in use -----------------------------------------------------------------------------------

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
        """The base with the adapter, ready to run (mlx-lm's model); the bare base while disabled.

        Blocks.
        """
        base = self.base
        if self._off:
            return base.module
        parameters = self.parameters
        lora = self.config
        make = partial(mlx_call, twin_with, base.module, base.spec, lora, parameters)
        return self._held.twin(lora, self._key(), make)

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the adapted model's most likely continuation (its answer, if it has a chat
        template).
        """
        return mlx_call(
            reply, self.module, self._model.tokenizer, prompt, max_tokens, self._spec.vocabulary
        )

    # --- files and fused models -------------------------------------------------------------------

    def save(self, path: str | Path, format: str = "mlx") -> str:
        """Write an adapter folder, whole or not at all.

        Return who can open it and, if need be, how to get its base.

        Args:
            path: of the folder; an existing one is replaced if it is empty or holds nothing but an
                adapter.
            format: ``mlx`` (``mlx_lm.load(base, adapter_path=path)``) or ``peft``.

        Raises:
            ConfigError: no such format, or the format cannot say what this adapter is.
            SaveError: the place cannot be written; what stood there is untouched.
        """
        base = self.base
        kind = self._model.config.get("model_type")
        given = (Path(path), self.parameters, self.config, base.spec, base.source or base.name)
        return mlx_call(save_adapter, *given, format=format, model_type=kind, unsaved=base.unsaved)

    @classmethod
    def load(cls, path: str | Path, source: Model | Quantizer) -> Adapter:
        """Open an adapter folder of qlab, mlx-lm or PEFT on a model.

        Raises:
            LoadError: the folder is no adapter of this model; names file and key.
        """
        lora, parameters, notes = mlx_call(
            load_adapter, Path(path), getattr(source, "model", source).spec
        )
        made = cls(source, dtype=lora.dtype)
        made._take(replace(lora, init="default"))
        made.set_parameters(parameters, str(path))
        made.notes = notes
        return made

    def preview(self) -> Survival:
        """Measure how much of the adapter survives each way to fuse it; blocks."""
        given = self._whole()
        first = self.original and self.original.module
        return self._jobs.run(lambda: preview(*given, first))

    def fuse(self, bits: int | str = 16, onto: str = "base", rest: int | str = "base") -> Model:
        """Return a new model with the adapter in its weights; the base stays. Blocks.

        Args:
            bits: of the adapted layers: 16, 8, or ``base`` for the base's own storage, which may
                lose most of an adapter: ``preview`` says how much.
            onto: ``base``, what was trained on, or ``original``, the weights before they were
                quantized.
            rest: of the other layers: ``base``, as they are, or 16.

        Raises:
            ConfigError: another word, or no original is known.
        """
        given = self._whole()
        first = self.original and self.original.module
        module = self._jobs.run(lambda: fuse(*given, bits, onto, first, rest))
        return Model(
            Loaded(module, self._model.tokenizer, self._model.config, f"{self._model.name} fused")
        )

    # --- what a rank recovers ---------------------------------------------------------------------

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
        self._jobs.run(lambda: self._survey.measure(self._key(), self.config, text))
        return self.report

    # --- the panel --------------------------------------------------------------------------------

    def state(self) -> AdapterState:
        """What the panel shows now, as a value."""
        found, stale = self._survey.found(self._key())
        plan = self.plan
        return AdapterState(
            spec=self._spec,
            config=self.config,
            storage=plan.default.label if plan else self._spec.stored or "16-bit",
            recoveries=found,
            stale=stale,
            obstacle=self._obstacle(),
            origin=self.origin,
            progress=self._jobs.progress,
            error=self._jobs.error,
            source="q" if self._quantizer is not None else "model",
        )

    def _panel_opened(self) -> None:
        self._refresh()

    def _stop_work(self) -> None:
        self._jobs.stop()
        if self._quantizer is not None:
            self._quantizer.unobserve(self._on_source, _STORED_BY)

    # --- within -----------------------------------------------------------------------------------

    def _allow(self, config: LoRAConfig) -> None:
        """Refuse a config that does not fit the model, or that the trained parameters do not fit."""
        config.targets(self._spec)
        if config.init != "default" and (obstacle := self._obstacle()):
            raise ConfigError(f"init={config.init!r} is not possible: {obstacle}")
        self._held.check(config)

    def _obstacle(self) -> str:
        return (
            ""
            if self._quantizer is not None
            else NO_ORIGINAL
            if self.original is None
            else NOT_QUANTIZED
        )

    def _key(self) -> tuple[QuantPlan | None, str]:
        """Storage of the base: what it was trained on, or what is chosen now."""
        now = (
            (self._quantizer.plan, self._quantizer.solver)
            if self._quantizer is not None
            else (self._model.plan, "")
        )
        return now if self._held.pinned is None else self._held.pinned[0]

    def _start(self) -> dict[str, Any]:
        """Make the parameters that it starts with."""
        base = self.base
        lora = self.config
        if lora.init == "default":
            return mlx_call(adapt.fresh, base.module, base.spec, lora, self.seed)
        return self._jobs.run(lambda: self._survey.compensate(base.module, lora))

    def _whole(self) -> tuple[Any, ...]:
        """The base, its layers, the parameters and what they are."""
        base = self.base
        return base.module, base.spec, self.parameters, self.config

    def _refresh(self) -> None:
        """Measure anew in the background if somebody looks."""
        if self._panel is not None and not self._obstacle():
            self._jobs.start(
                lambda: self._survey.measure(self._key(), self.config, self._spec.size <= AUTO_SIZE)
            )
        self._show()

    def _on_trait(self, change: Any) -> None:
        if change["name"] in ("keys", "kind", "num_layers"):
            self._refresh()
        self._show()

    def _on_source(self, change: Any) -> None:
        if self._held.pinned is None:
            self._refresh()

    def _do_set(self, intent: dict[str, Any]) -> None:
        self._take(replace(self.config, **intent["config"]))

    def _do_measure(self, intent: dict[str, Any]) -> None:
        self._jobs.start(lambda: self._survey.measure(self._key(), self.config, True))

    def _do_cancel(self, intent: dict[str, Any]) -> None:
        self._jobs.stop()

    def _do_reset(self, intent: dict[str, Any]) -> None:
        self.reset()
