"""A model taken apart into what comes before its blocks, the blocks, and what comes after.

Works for every mlx-lm model whose blocks stand in one list and pass one hidden state on; knows no
architecture by name. The model's own forward pass is run with its blocks replaced by stand-ins, so
masks, scalings and soft caps stay its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.packed_rows import NO_CACHE, PackedRowsCache
from qlab.engine.models.surgery import module_at, put_module
from qlab.errors import UnsupportedError

_NOISE = (
    1e-2  # the same operations in the same order, so far below that unless something is left out
)


class _Stand:
    """Takes the place of a block; whatever else the model asks of the block, the block answers."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        self._block = block
        self._call = call

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


class BlockStack:
    """The blocks of a model.

    Args:
        module: an mlx-lm model that nobody else uses: its blocks are taken out and put back.

    Attributes:
        path: of the list of blocks, such as ``model.layers``.
        blocks: the blocks.

    Raises:
        UnsupportedError: the model has no list of blocks.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.path = _path(module)
        self.blocks_held: Any = module_at(module, self.path)
        self.blocks: list[nn.Module] = list(self.blocks_held)
        for block in self.blocks:
            block.__class__ = _without_checkpoints(type(block), type(block).__call__)

    def before(
        self, tokens: mx.array, segments: mx.array | None = None
    ) -> tuple[mx.array, list[tuple[tuple, dict]]]:
        """Return the first block's input, and the other arguments of every block.

        Args:
            tokens: ``(batch, length)``.
            segments: ``(batch, length)``, number of the packed row that each token belongs to; None
                if rows are not packed.

        Returns:
            ``(batch, length, width)`` and, for each block, positional and keyword arguments after
            the hidden state.

        Raises:
            UnsupportedError: a block is not called once, with one hidden state.
        """
        first: list[mx.array] = []
        calls: list[tuple[tuple, dict]] = []

        def take(x: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(x, mx.array) or x.ndim != 3:
                raise UnsupportedError(
                    "The blocks of this model do not pass one hidden state (batch, length, width) on."
                )
            first.append(x)
            calls.append(
                (
                    tuple(map(_without_arrays, args)),
                    {name: _without_arrays(value) for name, value in kwargs.items()},
                )
            )
            return x

        with self._standing([take] * len(self.blocks)) as module:
            try:
                run(module, tokens, segments)
            except (
                ValueError,
                TypeError,
                AttributeError,
                IndexError,
            ) as error:  # it wants more of a block than a hidden state
                raise UnsupportedError(
                    f"The model cannot be taken apart into its blocks: {error}"
                ) from error
        if len(calls) != len(self.blocks):
            raise UnsupportedError(
                f"The model calls {len(calls)} of its {len(self.blocks)} blocks."
            )
        return first[0], calls

    def logits(
        self, tokens: mx.array, segments: mx.array | None = None, last: int | None = None
    ) -> mx.array:
        """Return logits computed block by block, each evaluated; of all positions or the last ones.

        Raises:
            UnsupportedError: a block does not pass one hidden state on.
        """
        x, calls = self.before(tokens, segments)
        for block, (args, kwargs) in zip(self.blocks, calls, strict=True):
            y = block(x, *args, **kwargs)
            if not isinstance(y, mx.array) or y.shape != x.shape:
                raise UnsupportedError(
                    "The blocks of this model do not pass one hidden state (batch, length, width) on."
                )
            mx.eval(y)
            x = y
        return self.after(x if last is None else x[:, -last:])

    def check(self) -> None:
        """Compare the pieces with the whole on a few tokens.

        Raises:
            UnsupportedError: the model does more with its blocks than to run one after the other.
        """
        tokens = mx.arange(6)[None]
        whole = self.module(tokens)
        pieces = self.logits(tokens)
        far = mx.linalg.norm((whole - pieces).astype(mx.float32)) / mx.linalg.norm(
            whole.astype(mx.float32)
        )
        if not far.item() < _NOISE:
            raise UnsupportedError(
                "The model does more with its blocks than to run one after the other."
            )

    def after(self, hidden: mx.array) -> mx.array:
        """Return the logits that follow from the last block's output, ``(batch, length, width)``."""

        def same(x: Any, *_: Any, **__: Any) -> Any:
            return x

        calls = [same] * (len(self.blocks) - 1) + [lambda *_, **__: hidden]
        with self._standing(calls) as module:
            return module(mx.zeros(hidden.shape[:2], mx.int32))

    @contextmanager
    def _standing(self, calls: list[Callable[..., Any]]) -> Iterator[nn.Module]:
        stands: Any = [_Stand(block, call) for block, call in zip(self.blocks, calls, strict=True)]
        put_module(self.module, self.path, stands)
        try:
            yield self.module
        finally:
            put_module(self.module, self.path, self.blocks)  # type: ignore


@cache
def _without_checkpoints(kind: type, call: Callable[..., Any]) -> type:
    """Return a class of blocks as it was before mlx-lm's ``grad_checkpoint`` changed it, for the
    rest of the process.

    Its function leaves arrays of a trace behind in the block; here a step knows itself what it
    computes again.
    """
    original = call
    while getattr(original, "__module__", "") == "mlx_lm.tuner.trainer":
        original = inspect.getclosurevars(original).nonlocals["fn"]
    return (
        kind
        if original is call
        else type(kind.__name__, (kind,), {"__call__": original, "__module__": kind.__module__})
    )


def run(module: nn.Module, tokens: mx.array, segments: mx.array | None) -> mx.array:
    """Return a model's logits, packed rows kept apart."""
    if segments is None:
        return module(tokens)
    blocks = module_at(module, _path(module)) if not hasattr(module, "layers") else module.layers
    return module(tokens, cache=[PackedRowsCache(segments)] * len(blocks))


def _without_arrays(value: Any) -> Any:
    """A block gets its mask as an argument.

    What stands for a cache must hold no array, or a compiled block would keep it.
    """
    return NO_CACHE if isinstance(value, PackedRowsCache) else value


def _path(module: nn.Module) -> str:
    """Path of the list with the most parameters."""
    best = ""
    most = 0
    for path, node in [("", module), *module.named_modules()]:
        for key, value in node.items():
            if isinstance(value, list) and value and all(isinstance(x, nn.Module) for x in value):
                size = sum(len(list(x.modules())) for x in value)
                if size > most:
                    best = f"{path}.{key}".lstrip(".")
                    most = size
    if not best:
        raise UnsupportedError("The model has no list of blocks.")
    return best
