"""``Model``: what ``qlab.load`` returns, and what quantizing returns. Wiring only."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

from qlab.core.config import QuantPlan
from qlab.core.spec import ModelSpec
from qlab.engine import load as _load
from qlab.engine.export import save as _save
from qlab.engine.job import mlx_call
from qlab.engine.memory import generate as _generate
from qlab.engine.memory import release
from qlab.engine.skeleton import describe
from qlab.engine.study import Study


class Model:
    """A language model in this kernel.

    Attributes:
        name: short name.
        module: mlx-lm's model.
        tokenizer: mlx-lm's tokenizer wrapper.
        config: contents of config.json.
        spec: the layers: paths, shapes, dtypes, bytes.
        notes: what to know about where it came from.
        plan: how it was quantized here, or None.
    """

    def __init__(self, loaded: _load.Loaded, plan: QuantPlan | None = None) -> None:
        self.name, self.module, self.tokenizer = loaded.name, loaded.module, loaded.tokenizer
        self.config, self.notes, self.plan = loaded.config, loaded.notes, plan
        self.spec: ModelSpec = mlx_call(describe, loaded.module, loaded.name)
        self._study: Study | None = None
        self._lock = threading.Lock()

    @property
    def study(self) -> Study:
        """What has been measured of this model; shared by all panels on it."""
        with self._lock:  # a job and a cell may both be the first to ask
            if self._study is None:
                self._study = Study(self.module, self.tokenizer, self.spec)
            return self._study

    def save(self, path: str | Path) -> str:
        """Write a model folder, whole or not at all; return a sentence that says who can open it.

        Args:
            path: of the folder.

        Raises:
            SaveError: the place cannot be written; what stood there is untouched.
        """
        return mlx_call(_save, Path(path), self.module, self.tokenizer, self.config, self.plan)

    def generate(self, prompt: str, max_tokens: int = 64) -> str:
        """Return the model's most likely continuation (its answer, if it has a chat template)."""
        return mlx_call(_generate, self.module, self.tokenizer, prompt, max_tokens)

    def free(self) -> str:
        """Give the memory back; return a sentence that says how much came back, and what may still hold the rest."""
        held, self.module, self._study = self.spec.nbytes, None, None
        gc.collect()
        return mlx_call(release, held)

    def __repr__(self) -> str:
        facts = f"{self.spec.size / 1e6:.1f} M weights, {self.spec.nbytes / 1e9:.3f} GB"
        kind = f", {self.plan.default.label}" if self.plan else ""
        return "\n".join([f"Model({self.name!r}, {facts}{kind})", *self.notes])


def load(source: str | Path) -> Model:
    """Open a model.

    Args:
        source: ``"demo"`` (embedded, offline), a local folder, a ``.gguf`` file, or a hub id such as
            ``mlx-community/Qwen3-0.6B-bf16``.

    Raises:
        LoadError: missing, truncated, not a model, or of an unknown architecture.
    """
    return Model(mlx_call(_load.load, source))
