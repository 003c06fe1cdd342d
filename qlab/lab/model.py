"""``Model``: what ``qlab.load`` returns, and what quantizing returns. Wiring only."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

from qlab.core.config.code import base_code
from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.engine.evaluate.generate import reply
from qlab.engine.io import load as _load
from qlab.engine.io.loaded import Loaded
from qlab.engine.io.save import save as _save
from qlab.engine.models.skeleton import describe
from qlab.engine.quantize.study import Study
from qlab.errors import LoadError, sealed
from qlab.runtime.job import mlx_call
from qlab.runtime.limits import release


@sealed
class Model:
    """A language model in this kernel.

    Attributes:
        name: short name.
        tokenizer: mlx-lm's tokenizer wrapper.
        config: contents of config.json.
        spec: the layers: paths, shapes, dtypes, bytes.
        notes: what to know about where it came from.
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
        self.name = loaded.name
        self._module = loaded.module
        self.tokenizer = loaded.tokenizer
        self.config = loaded.config
        self.notes = loaded.notes
        self.plan = plan
        self.solver = solver
        self.source = source or (original.source if original else "")
        self._original = weakref.ref(original) if original else None
        self.spec: ModelSpec = mlx_call(describe, loaded.module, loaded.name)
        self._study: Study | None = None
        self._lock = threading.Lock()

    @property
    def module(self) -> Any:
        """mlx-lm's model.

        Raises:
            LoadError: it was given back by ``free``.
        """
        if self._module is None:
            raise LoadError(f"{self.name!r} was given back by free(); load it again.")
        return self._module

    @property
    def original(self) -> Model | None:
        """The model that this one was quantized from, while something else still holds it.

        Itself if it is not quantized.
        """
        if self.plan is None:
            return None if self.spec.stored else self
        return self._original() if self._original else None

    @property
    def study(self) -> Study:
        """What has been measured of this model; shared by all panels on it."""
        with self._lock:  # a job and a cell may both be the first to ask
            if self._study is None:
                self._study = Study(self.module, self.tokenizer, self.spec)
            return self._study

    @property
    def unsaved(self) -> tuple[str, str]:
        """If mlx-lm finds this very model nowhere.

        What it is, and the Python that writes it to a folder.
        """
        if (
            self.plan is None
            and self.source
            and self.source != "demo"
            and not self.source.endswith(".gguf")
        ):
            return "", ""
        words = (
            f"{self.plan.label} of {self.source or self.name!r}" if self.plan else repr(self.name)
        )
        return words, base_code(self.source, self.plan, self.solver) if self.source else ""

    def save(self, path: str | Path) -> str:
        """Write a model folder, whole or not at all; return a sentence that says who can open it.

        Args:
            path: of the folder; an existing one is replaced if it is empty or holds a model and
                nothing else.

        Raises:
            SaveError: the place cannot be written, or holds other files; what stood there is
                untouched.
        """
        return mlx_call(_save, Path(path), self.module, self.tokenizer, self.config, self.plan)

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the model's most likely continuation (its answer, if it has a chat template)."""
        return mlx_call(
            reply, self.module, self.tokenizer, prompt, max_tokens, self.spec.vocabulary
        )

    def free(self) -> str:
        """Give the memory back.

        Return a sentence that says how much came back, and what may still hold the rest.
        """
        held = self.spec.nbytes
        self._module = None
        self._study = None
        gc.collect()
        return mlx_call(release, held)

    def __repr__(self) -> str:
        facts = f"{self.spec.size / 1e6:.1f} M weights, {self.spec.nbytes / 1e9:.3f} GB"
        kind = f", {self.plan.default.label}" if self.plan else ""
        return "\n".join([f"Model({self.name!r}, {facts}{kind})", *self.notes])


def load(source: str | Path) -> Model:
    """Open a model.

    Args:
        source: ``"demo"`` (embedded, offline), a local folder, a ``.gguf`` file, or a hub id such
            as ``mlx-community/Qwen3-0.6B-bf16``.

    Raises:
        LoadError: missing, truncated, not a model, or of an unknown architecture.
    """
    if not isinstance(source, (str, Path)) or not str(source).strip():
        raise LoadError(
            f"source={source!r} is not legal; give a folder, a .gguf file, a hub id or 'demo'."
        )
    known = Path(source).expanduser()
    return Model(
        mlx_call(_load.load, source),
        source=str(known.resolve() if known.exists() and source != "demo" else source),
    )
