"""``SampleGenerations``: what a model in training answers to the same prompts at several steps.

``Trainer`` asks the user's prompts at every validation, and others when the user wants to.
"""

from __future__ import annotations

import threading

from qlab.core.train.events import SampleGeneration
from qlab.lab.adapter import Adapter


class SampleGenerations:
    """Answers of one model over the course of a run.

    Args:
        adapter: adapter in training; its present parameters answer.
        prompts: asked by ``ask_all``.
    """

    def __init__(self, adapter: Adapter, prompts: tuple[str, ...]) -> None:
        self._adapter = adapter
        self._prompts = prompts
        self._lock = threading.Lock()  # cells, the panel and the run may ask at once
        self._generations: tuple[SampleGeneration, ...] = ()

    @property
    def all(self) -> tuple[SampleGeneration, ...]:
        """All answers, oldest first."""
        return self._generations

    def ask(self, prompt: str, step: int, max_tokens: int = 64) -> str:
        """Return the answer to a prompt, and remember it.

        Args:
            prompt: what to ask.
            step: optimizer steps that the model has made.
            max_tokens: longest answer.
        """
        text = self._adapter.generate(prompt, max_tokens)
        with self._lock:
            self._generations += (SampleGeneration(step, prompt, text),)
        return text

    def ask_all(self, step: int) -> None:
        """Ask every prompt that has not been asked at this step."""
        asked = {item.prompt for item in self._generations if item.step == step}
        for prompt in self._prompts:
            if prompt not in asked:
                self.ask(prompt, step)
