"""``Adapter``: small trainable changes of a frozen model, chosen by traits, sliders or code.

Its settings are traits (``adapter_traits``); with a base and parameters it is an
``adapted_model``. This file adds files, fused models, what a rank recovers, and the panel.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlab.core.adapt.report import AdapterReport, report_of
from qlab.core.adapt.retention import RetentionReport
from qlab.core.config.lora import LoRAConfig
from qlab.core.panels.adapter import AdapterState
from qlab.core.progress import Progress
from qlab.core.saved import Saved
from qlab.deprecated import positional_arguments
from qlab.engine.adapt import parameters as engine
from qlab.engine.adapt.files import load_adapter, save_adapter
from qlab.engine.adapt.fuse import fuse
from qlab.engine.adapt.preview import preview
from qlab.engine.adapt.recovery_cache import RecoveryCache
from qlab.engine.io.loaded import Loaded
from qlab.errors import ConfigError, reject_unknown_arguments, reject_unknown_attributes
from qlab.lab.adapted_model import AdaptedModel
from qlab.lab.adapter_base import AdapterBase
from qlab.lab.adapter_traits import TRAITS
from qlab.lab.model import Model
from qlab.lab.panel import HasPanel, PanelViews
from qlab.lab.quantizer import Quantizer
from qlab.runtime.job import LatestJob, mlx_call
from qlab.views.adapter.static import html, page, text_line
from qlab.views.adapter.widget import AdapterPanel

# parameters up to which a panel measures on the layers' outputs without being asked
AUTO_OUTPUT_SIZE = 1e9


@reject_unknown_arguments
@reject_unknown_attributes
class Adapter(HasPanel, AdaptedModel):
    """Small trainable changes of a frozen model.

    As the last line of a cell it is a panel. Its traits (``kind``, ``rank``, ``scale``,
    ``dropout``, ``keys``, ``num_layers``, ``init``, ``rslora``) and the sliders are one state, in
    both directions. The model itself never changes.

    Example:
        >>> q = qlab.Quantizer(qlab.load("demo"), bits=4)
        >>> a = qlab.Adapter(q, rank=8, alpha=16, keys=["q_proj", "v_proj"])
        >>> a.rank = 16
        >>> a.report.size  # trainable parameters
        >>> qlab.Trainer(a, rows).run()
        >>> a.save("adapter")

    Args:
        source: a model, or a ``Quantizer``: then its quantized model is adapted, and follows its
            sliders until the adapter is trained.
        kind: name on the shelf of adapters; this and what follows is as in ``LoRAConfig``.
        rank: inner width of the change.
        alpha: scale × rank (with ``rslora`` scale × √rank); give alpha or scale. The default is 2 ×
            rank.
        scale: factor of the change.
        dropout: share of the adapter's inputs that a training step drops, in [0, 1).
        keys: layers to adapt, by name or glob; None is every linear layer, those of experts too.
        num_layers: number of blocks to adapt, the last ones; −1 is all.
        init: how the change begins.
        rslora: whether alpha is divided by √rank instead of rank.
        dtype: of the trainable parameters: ``float32`` or ``bfloat16``.
        text: for ``init="diagonal"`` and ``"qera"``: a path, a string, rows, or a ``datasets`` set.
            None is the embedded text.
        seed: for the random initial parameters and for dropout.

    Attributes:
        seed: as given.
        run: name of the run that trains it now; empty if none does.
        notes: what to know about the folder that it was loaded from.

    Raises:
        ConfigError: a setting is not legal or does not fit the model.
        LayerNotFoundError: a key matches no layer; names the nearest.
    """

    _views = PanelViews(panel=AdapterPanel, text_line=text_line, html=html, page=page)

    @positional_arguments
    def __init__(
        self,
        source: Model | Quantizer,
        *,
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
        base = AdapterBase(source)
        config = LoRAConfig(
            kind=kind,
            rank=rank,
            dropout=dropout,
            keys=keys,
            num_layers=num_layers,
            init=init,
            rslora=rslora,
            dtype=dtype,
        )
        config = config.scaled(alpha, scale)
        super().__init__(base, seed)
        self._jobs = LatestJob(self._show)
        self._recovery = RecoveryCache(base.model.measurements, base.model.tokenizer, text)
        self.notes: tuple[str, ...] = ()
        self._take(config)
        self.observe(self._on_trait, list(TRAITS))
        base.observe(self._on_source)

    @property
    def code(self) -> str:
        """The Python that rebuilds this adapter."""
        return self.state().code

    # --- files and fused models -------------------------------------------------------------------

    @positional_arguments
    def save(self, path: str | Path, *, format: str = "mlx") -> Saved:
        """Write an adapter folder, whole or not at all.

        Args:
            path: of the folder; an existing one is replaced if it is empty or holds nothing but an
                adapter.
            format: ``mlx`` (``mlx_lm.load(base, adapter_path=path)``) or ``peft``.

        Returns:
            The path and the programs that open it; prints as a sentence, which also says how to get
            the base if it is in no folder yet.

        Raises:
            ConfigError: no such format, or the format cannot say what this adapter is.
            SaveError: the place cannot be written; what stood there is untouched.
        """
        base = self.base
        return mlx_call(
            save_adapter,
            Path(path),
            self.parameters,
            self.config,
            base.spec,
            base.source or base.name,
            format=format,
            model_type=self.model.config.get("model_type"),
            unsaved=base.unsaved,
        )

    @classmethod
    def load(cls, path: str | Path, source: Model | Quantizer) -> Adapter:
        """Open an adapter folder of qlab, mlx-lm or PEFT on a model.

        Args:
            path: of the folder.
            source: the model or quantizer whose model it was trained on.

        Raises:
            LoadError: the folder is no adapter of this model; names file and key.
        """
        spec = AdapterBase(source).model.spec
        config, parameters, notes = mlx_call(load_adapter, Path(path), spec)
        adapter = cls(source, dtype=config.dtype)
        # trained by now: how it began matters no more
        adapter._take(replace(config, init="default"))
        adapter.set_parameters(parameters, str(path))
        adapter.notes = notes
        return adapter

    def preview(self) -> RetentionReport:
        """Measure how much of the adapter each way to fuse it retains; blocks."""
        base = self.base
        parameters = self.parameters
        return self._jobs.run(
            lambda: preview(
                base.module, base.spec, parameters, self.config, self._original_module()
            )
        )

    @positional_arguments
    def fuse(self, bits: int | str = 16, *, onto: str = "base", rest: int | str = "base") -> Model:
        """Return a new model with the adapter in its weights; the base stays. Blocks.

        Example:
            >>> a.preview()  # what each way retains
            >>> a.fuse(bits=8).save("fused")

        Args:
            bits: of the adapted layers: 16, 8, or ``base`` for the base's own storage, which may
                lose most of an adapter: ``preview`` says how much.
            onto: ``base``, what was trained on, or ``original``, the weights before they were
                quantized.
            rest: of the other layers: ``base``, as they are, or 16.

        Raises:
            ConfigError: another word, or no original is known.
        """
        base = self.base
        parameters = self.parameters
        module = self._jobs.run(
            lambda: fuse(
                base.module,
                base.spec,
                parameters,
                self.config,
                bits=bits,
                onto=onto,
                original=self._original_module(),
                rest=rest,
            )
        )
        model = self.model
        loaded = Loaded(
            module=module,
            tokenizer=model.tokenizer,
            config=model.config,
            name=f"{model.name} fused",
        )
        return Model(loaded)

    def _original_module(self) -> Any:
        original = self.original
        return None if original is None else original.module

    # --- what a rank recovers ---------------------------------------------------------------------

    @property
    def report(self) -> AdapterReport:
        """The adapter, layer by layer, with what has been measured; ``measure`` measures it."""
        recoveries, _ = self._recovery.latest(self._storage)
        return report_of(self._spec, self.config, recoveries)

    def measure(self, text: bool = True) -> AdapterReport:
        """Measure how much of the quantization error each rank recovers; blocks.

        Args:
            text: whether also on the layers' outputs, for which two texts pass the model; False
                measures on the weights alone.

        Returns:
            The report.

        Raises:
            ConfigError: nothing is quantized, or no original is known.
        """
        obstacle = self._base.obstacle
        if obstacle:
            raise ConfigError(obstacle)
        self._jobs.run(lambda: self._measure(outputs=text))
        return self.report

    def _measure(self, outputs: bool) -> Generator[Progress, None, None]:
        plan, solver = self._storage
        if plan is None:  # then there is an obstacle, which callers check
            raise ConfigError(self._base.obstacle)
        yield from self._recovery.measure((plan, solver), self.config, outputs)

    # --- the panel --------------------------------------------------------------------------------

    def state(self) -> AdapterState:
        """What the panel shows now, as a value."""
        recoveries, stale = self._recovery.latest(self._storage)
        return AdapterState(
            spec=self._spec,
            config=self.config,
            storage=self.storage_label,
            recoveries=recoveries,
            stale=stale,
            obstacle=self._base.obstacle,
            origin=self.origin,
            progress=self._jobs.progress,
            error=self._jobs.error,
            source="model" if self._base.quantizer is None else "q",
        )

    def _panel_opened(self) -> None:
        self._refresh()

    def _parameters_changed(self) -> None:
        # trained parameters tie the adapter to one storage; without them it follows the sliders
        if self._arrays.trained_on is None:
            self._refresh()
        else:
            self._show()

    def _stop_work(self) -> None:
        self._jobs.stop()
        self._base.unobserve(self._on_source)

    def _refresh(self) -> None:
        """Measure anew in the background if there is a panel to show it."""
        if self._panel is not None and not self._base.obstacle:
            outputs = self._spec.size <= AUTO_OUTPUT_SIZE
            self._jobs.start(lambda: self._measure(outputs))
        self._show()

    def _on_trait(self, change: Any) -> None:
        if change["name"] in ("keys", "kind", "num_layers"):
            self._refresh()
        self._show()

    def _on_source(self, change: Any) -> None:
        if self._arrays.trained_on is None:
            self._refresh()

    def _do_set(self, intent: dict[str, Any]) -> None:
        self._take(replace(self.config, **intent["config"]))

    def _do_measure(self, intent: dict[str, Any]) -> None:
        self._jobs.start(lambda: self._measure(outputs=True))

    def _do_cancel(self, intent: dict[str, Any]) -> None:
        self._jobs.stop()

    def _do_reset(self, intent: dict[str, Any]) -> None:
        self.reset()

    # --- within -----------------------------------------------------------------------------------

    def _initial_parameters(self) -> dict[str, Any]:
        base = self.base
        config = self.config
        if config.init == "default":
            return mlx_call(engine.fresh, base.module, base.spec, config, self.seed)
        return self._jobs.run(lambda: self._recovery.compensate(base.module, config))

    def _allow(self, config: LoRAConfig) -> None:
        """Refuse a config that does not fit the model or the trained parameters."""
        config.targets(self._spec)
        obstacle = self._base.obstacle
        if config.init != "default" and obstacle:
            raise ConfigError(f"init={config.init!r} is not possible: {obstacle}")
        self._arrays.check(config)
