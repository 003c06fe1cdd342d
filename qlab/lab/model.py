"""``Model``: a language model in this kernel, and ``load``, which opens one.

Quantizers, adapters and trainers start from a ``Model``. It hands its work to the engine.
"""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlab.core.config.code import base_code
from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.core.saved import Saved
from qlab.engine.evaluate.generate import reply
from qlab.engine.io import load as _load
from qlab.engine.io.loaded import Loaded
from qlab.engine.io.save import save as _save
from qlab.engine.io.source import find
from qlab.engine.models.skeleton import describe
from qlab.engine.quantize.measurements import ModelMeasurements
from qlab.errors import LoadError, reject_unknown_attributes
from qlab.runtime.job import mlx_call
from qlab.runtime.limits import release


@reject_unknown_attributes
class Model:
    """A language model in this kernel, as ``qlab.load`` or ``Quantizer.quantize`` returns it.

    Example:
        >>> model = qlab.load("demo")
        >>> model.spec.layers[0].path, model.spec.nbytes
        >>> model.generate("It is a truth universally acknowledged, that")
        >>> model.save("folder")  # opens with mlx_lm.load

    Args:
        loaded: what was opened: module, tokenizer, config, name and notes.
        plan: how it was quantized here.
        solver: by which its codes were chosen.
        original: the model that it was quantized from.
        source: what ``load`` was given.

    Attributes:
        spec: the layers: paths, shapes, dtypes, bytes.
        plan: how it was quantized here, or None.
        solver: by which its codes were chosen; empty if it was not quantized here.
        source: what ``load`` was given.
    """

    def __init__(
        self,
        loaded: Loaded,
        plan: QuantPlan | None = None,
        solver: str = "",
        original: Model | None = None,
        source: str = "",
    ) -> None:
        self._loaded = loaded
        self.plan = plan
        self.solver = solver
        self.source = source or (original.source if original else "")
        # weak: a quantized model must not hold the memory of the full one
        self._original = weakref.ref(original) if original else None
        self.spec: ModelSpec = mlx_call(describe, loaded.module, loaded.name)
        self._measurements: ModelMeasurements | None = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Short name, for headlines."""
        return self._loaded.name

    @property
    def tokenizer(self) -> Any:
        """mlx-lm's ``TokenizerWrapper``."""
        return self._loaded.tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        return self._loaded.config

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about where it came from."""
        return self._loaded.notes

    @property
    def storage_label(self) -> str:
        """Storage of the weights in words, such as ``affine 4-bit g64`` or ``16-bit``."""
        return storage_label(self.plan, self.spec)

    @property
    def module(self) -> Any:
        """mlx-lm's model.

        Raises:
            LoadError: it was given back by ``free``.
        """
        if self._loaded.module is None:
            raise LoadError(f"{self.name!r} was given back by free(); load it again.")
        return self._loaded.module

    @property
    def original(self) -> Model | None:
        """The model that this one was quantized from, while something else still holds it.

        Itself if it is not quantized; None if it came quantized.
        """
        if self.plan is None:
            return None if self.spec.storage else self
        return self._original() if self._original else None

    @property
    def measurements(self) -> ModelMeasurements:
        """What has been measured of this model; shared by all panels on it."""
        with self._lock:  # a job and a cell may both be the first to ask
            if self._measurements is None:
                self._measurements = ModelMeasurements(self.module, self.tokenizer, self.spec)
            return self._measurements

    @property
    def unsaved(self) -> tuple[str, str]:
        """For a model that mlx-lm cannot open anywhere: what it is, and the Python that saves it.

        Both are empty if mlx-lm opens it at ``source``.
        """
        in_mlx_format = self.source not in ("", "demo") and not self.source.endswith(".gguf")
        if self.plan is None and in_mlx_format:
            return "", ""
        words = repr(self.name)
        if self.plan is not None:
            words = f"{self.plan.label} of {self.source or self.name!r}"
        code = base_code(self.source, self.plan, self.solver) if self.source else ""
        return words, code

    def save(self, path: str | Path) -> Saved:
        """Write a model folder, whole or not at all.

        Args:
            path: of the folder; an existing one is replaced if it is empty or holds a model and
                nothing else.

        Returns:
            The path and the programs that open it; prints as a sentence.

        Raises:
            SaveError: the place cannot be written, or holds other files; what stood there is
                untouched.
        """
        return mlx_call(_save, Path(path), self.module, self.tokenizer, self.config, self.plan)

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the model's most likely continuation, or answer if it has a chat template.

        Args:
            prompt: text; with a chat template it is the user's message.
            max_tokens: to write at most.
        """
        return mlx_call(
            reply, self.module, self.tokenizer, prompt, max_tokens, self.spec.vocabulary
        )

    def free(self) -> str:
        """Give the memory back.

        Returns:
            How much came back, and what may still hold the rest, in words.
        """
        nbytes = self.spec.nbytes
        self._loaded = replace(self._loaded, module=None)
        self._measurements = None
        gc.collect()
        return mlx_call(release, nbytes)

    def __repr__(self) -> str:
        size = f"{self.spec.size / 1e6:.1f} M weights, {self.spec.nbytes / 1e9:.3f} GB"
        storage = f", {self.storage_label}" if self.plan else ""
        return "\n".join([f"Model({self.name!r}, {size}{storage})", *self.notes])


def storage_label(plan: QuantPlan | None, spec: ModelSpec) -> str:
    """Return the storage of a model in words.

    Args:
        plan: how it was quantized here; None if it stays as it came.
        spec: its layers.
    """
    if plan is not None:
        return plan.default.label
    return spec.storage_label


def load(source: str | Path) -> Model:
    """Open a model.

    Example:
        >>> model = qlab.load("mlx-community/Qwen3-0.6B-bf16")

    Args:
        source: ``"demo"`` (embedded, offline), a local folder, a ``.gguf`` file, or a hub id such
            as ``mlx-community/Qwen3-0.6B-bf16``.

    Raises:
        LoadError: missing, truncated, not a model, or of an unknown architecture.
    """
    reference = find(source).reference
    return Model(mlx_call(_load.load, source), source=reference)
