"""A frozen model with an adapter: its base, its parameters, and the two at work together.

``Adapter`` inherits it and adds files, fused models and a panel. The parameters stand in
``adapter_arrays``, the base in ``adapter_base``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from qlab.core.config.quant import QuantPlan
from qlab.engine.adapt import parameters as engine
from qlab.engine.adapt.attach import twin_with
from qlab.engine.evaluate.generate import reply
from qlab.errors import BusyError
from qlab.lab.adapter_arrays import AdapterArrays, TrainedOn
from qlab.lab.adapter_base import AdapterBase, Storage
from qlab.lab.adapter_traits import AdapterChoice
from qlab.lab.model import Model, storage_label
from qlab.lab.quantizer import Quantizer
from qlab.runtime.job import mlx_call


class AdaptedModel(AdapterChoice):
    """An adapter's settings, with the model that it is put on and the parameters that it has.

    Args:
        base: gives the frozen model.
        seed: for the random initial parameters.

    Attributes:
        seed: as given.
        run: name of the run that trains it now; empty if none does.
    """

    def __init__(self, base: AdapterBase, seed: int) -> None:
        super().__init__()
        self._base = base
        self._spec = base.model.spec
        self._arrays = AdapterArrays()
        self._arrays_lock = threading.RLock()
        self._disabled = 0  # how many ``disabled`` blocks are open
        self.seed = seed
        self.run = ""

    # --- what a subclass adds ---------------------------------------------------------------------

    def _initial_parameters(self) -> dict[str, Any]:
        """Return the arrays to start with, by path; may block."""
        raise NotImplementedError

    def _parameters_changed(self) -> None:
        """Called after trained parameters were taken or dropped."""

    # --- the models -------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """What was given: the model, or the quantizer's."""
        return self._base.model

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer whose sliders the base follows.

        None if a model was given, or once the adapter is trained and so tied to its base.
        """
        return None if self._arrays.trained_on else self._base.quantizer

    @property
    def plan(self) -> QuantPlan | None:
        """Storage of the base; None if it stays as it came."""
        return self._storage.plan

    @property
    def storage_label(self) -> str:
        """Storage of the base in words, such as ``affine 4-bit g64``."""
        return storage_label(self.plan, self._spec)

    @property
    def base(self) -> Model:
        """The frozen model; a quantizer's plan is carried out at first use. Blocks."""
        trained_on = self._arrays.trained_on
        return trained_on.base if trained_on else self._base.build()

    @property
    def original(self) -> Model | None:
        """The model before it was quantized; None if that is not known."""
        return self._base.original

    # --- the parameters ---------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, Any]:
        """The trainable arrays by path, evaluated; made at first use. Blocks."""
        return self._arrays.get(self.config, self._storage, self._initial_parameters)

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
        expected = engine.expected(base.spec, self.config)
        arrays = mlx_call(engine.checked, parameters, expected)
        with self._arrays_lock:
            trained_on = TrainedOn(self._storage, base)
            self._arrays.take(arrays, self.config, trained_on, origin)
        self._parameters_changed()

    @property
    def version(self) -> int:
        """A number that rises with every change of the parameters."""
        return self._arrays.version

    @property
    def origin(self) -> str:
        """Where trained parameters come from, in words; empty while they are the initial ones."""
        return self._arrays.origin

    @property
    def trained(self) -> bool:
        """Whether the parameters are other than the initial ones."""
        return bool(self.origin)

    def reset(self) -> None:
        """Go back to the initial parameters.

        Trained ones are dropped, and the base follows the quantizer's sliders again.

        Raises:
            BusyError: a run trains it.
        """
        self.check_not_in_training()
        with self._arrays_lock:
            self._arrays.drop()
        self._parameters_changed()

    def check_not_in_training(self) -> None:
        """Refuse what would take the parameters from under a run.

        Raises:
            BusyError: a run trains it.
        """
        if self.run:
            raise BusyError(f"The run {self.run!r} trains this adapter; stop it first.")

    def remove(self) -> Model:
        """Drop the adapter's arrays and return the base, which never changed."""
        base = self.base
        self.reset()
        self._base.forget()
        return base

    # --- in use -----------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[Model]:
        """Within, ``module`` and ``generate`` use the bare base.

        Example:
            >>> with a.disabled():
            ...     before = a.generate("2 + 2 =")
            >>> after = a.generate("2 + 2 =")
        """
        with self._arrays_lock:
            self._disabled += 1
        try:
            yield self.base
        finally:
            with self._arrays_lock:
                self._disabled -= 1

    @property
    def module(self) -> Any:
        """The base with the adapter, ready to run (mlx-lm's model); the bare base while disabled.

        Blocks.
        """
        base = self.base
        if self._disabled:
            return base.module
        parameters = self.parameters
        config = self.config
        make = partial(mlx_call, twin_with, base.module, base.spec, config, parameters)
        return self._arrays.adapted(config, self._storage, make)

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the adapted model's most likely continuation, or answer if it has a template.

        Args:
            prompt: text; with a chat template it is the user's message.
            max_tokens: to write at most.
        """
        tokenizer = self.model.tokenizer
        return mlx_call(reply, self.module, tokenizer, prompt, max_tokens, self._spec.vocabulary)

    # --- within -----------------------------------------------------------------------------------

    @property
    def _storage(self) -> Storage:
        """Storage of the base: the one that it was trained on, or the one that is chosen now."""
        trained_on = self._arrays.trained_on
        return trained_on.storage if trained_on else self._base.storage
