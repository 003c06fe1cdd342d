"""A model taken apart into what comes before its blocks, the blocks, and what comes after.

Works for every mlx-lm model whose blocks stand in one list and pass one hidden state on; it knows
no architecture by name. The model's own forward pass is run with stand-ins in the place of its
blocks, so masks, scalings and soft caps stay the model's.

Used wherever a model is computed a block at a time: steps, their memory estimates, evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from qlab.engine.models.compare import relative_distance
from qlab.engine.models.packed_rows import NO_CACHE, PackedRowsCache
from qlab.engine.models.surgery import module_at, put_module
from qlab.errors import UnsupportedError

# relative distance of logits; the same operations in the same order stay far below it
_NOISE = 1e-2


class BlockCall(NamedTuple):
    """What a model hands to a block beside the hidden state, such as a mask and a cache.

    Attributes:
        args: positional arguments after the hidden state.
        kwargs: arguments by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockStack:
    """The blocks of a model, to be run one by one.

    Example:
        >>> stack = BlockStack(model)
        >>> x, calls = stack.before(tokens)
        >>> for block, (args, kwargs) in zip(stack.blocks, calls):
        ...     x = block(x, *args, **kwargs)
        >>> logits = stack.after(x)

    Args:
        module: an mlx-lm model; the stack must be its only user, because its blocks are taken out
            and put back.

    Attributes:
        module: the model.
        path: of the list of blocks, such as ``model.layers``.
        block_list: that list itself, as it stands in the model.
        blocks: the blocks.

    Raises:
        UnsupportedError: the model has no list of blocks.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.path = _path_of_blocks(module)
        self.block_list: Any = module_at(module, self.path)
        self.blocks: list[nn.Module] = list(self.block_list)
        without_mlx_lm_checkpointing(self.blocks)

    def before(
        self, tokens: mx.array, segments: mx.array | None = None
    ) -> tuple[mx.array, list[BlockCall]]:
        """Return the first block's input, and the other arguments of every block.

        Args:
            tokens: ``(batch, length)``.
            segments: ``(batch, length)``, number of the packed row that each token belongs to; None
                if rows are not packed.

        Returns:
            ``(batch, length, hidden)``, and one call for each block.

        Raises:
            UnsupportedError: a block is not called once, with one hidden state.
        """
        inputs: list[mx.array] = []
        calls: list[BlockCall] = []

        def record(x: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(x, mx.array) or x.ndim != 3:
                raise UnsupportedError(_NO_HIDDEN_STATE)
            inputs.append(x)
            plain_kwargs = {name: _without_arrays(value) for name, value in kwargs.items()}
            calls.append(BlockCall(tuple(map(_without_arrays, args)), plain_kwargs))
            return x

        with self._replaced([record] * len(self.blocks)) as module:
            try:
                run(module, tokens, segments)
            # it wants more of a block than a hidden state
            except (ValueError, TypeError, AttributeError, IndexError) as error:
                raise UnsupportedError(
                    f"The model cannot be taken apart into its blocks: {error}"
                ) from error
        if len(calls) != len(self.blocks):
            raise UnsupportedError(
                f"The model calls {len(calls)} of its {len(self.blocks)} blocks."
            )
        return inputs[0], calls

    def after(self, hidden: mx.array) -> mx.array:
        """Return the logits that follow from the last block's output.

        Args:
            hidden: ``(batch, length, hidden)``.

        Returns:
            ``(batch, length, vocabulary)``.
        """

        def unchanged(x: Any, *_: Any, **__: Any) -> Any:
            return x

        def last(*_: Any, **__: Any) -> mx.array:
            return hidden

        calls = [unchanged] * (len(self.blocks) - 1) + [last]
        with self._replaced(calls) as module:
            return module(mx.zeros(hidden.shape[:2], mx.int32))

    def logits(
        self, tokens: mx.array, segments: mx.array | None = None, last: int | None = None
    ) -> mx.array:
        """Return logits computed block by block, each evaluated.

        Args:
            tokens: ``(batch, length)``.
            segments: see ``before``.
            last: how many positions at the end; None means all.

        Returns:
            ``(batch, length or last, vocabulary)``.

        Raises:
            UnsupportedError: a block does not pass one hidden state on.
        """
        x, calls = self.before(tokens, segments)
        for block, (args, kwargs) in zip(self.blocks, calls, strict=True):
            y = block(x, *args, **kwargs)
            if not isinstance(y, mx.array) or y.shape != x.shape:
                raise UnsupportedError(_NO_HIDDEN_STATE)
            mx.eval(y)
            x = y
        return self.after(x if last is None else x[:, -last:])

    def check(self) -> None:
        """Compare the blocks run one by one with the model itself, on a few tokens.

        Raises:
            UnsupportedError: the model does more with its blocks than to run one after the other.
        """
        tokens = mx.arange(6)[None]
        if not relative_distance(self.logits(tokens), self.module(tokens)) < _NOISE:
            raise UnsupportedError(
                "The model does more with its blocks than to run one after the other."
            )

    @contextmanager
    def _replaced(self, calls: list[Callable[..., Any]]) -> Iterator[nn.Module]:
        """Give the model with a function in the place of each block; put the blocks back after."""
        stand_ins = [_StandIn(block, call) for block, call in zip(self.blocks, calls, strict=True)]
        put_module(self.module, self.path, stand_ins)
        try:
            yield self.module
        finally:
            put_module(self.module, self.path, self.blocks)


_NO_HIDDEN_STATE = (
    "The blocks of this model do not pass one hidden state (batch, length, width) on."
)


class _StandIn:
    """Takes the place of a block; whatever else the model asks of the block, the block answers."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        self._block = block
        self._call = call

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self._call(x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


def without_mlx_lm_checkpointing(blocks: Sequence[nn.Module]) -> None:
    """Undo mlx-lm's gradient checkpointing on some blocks; mlx-lm's own class stays as it is.

    ``mlx_lm.tuner.trainer.grad_checkpoint`` (mlx-lm 0.32.2, trainer.py line 27) replaces the
    ``__call__`` of a block's whole class for the rest of the process. Its function puts arrays of
    a trace into the block (``model.update(params)``) and leaves them there, so the next step would
    read them; a step knows itself what it computes again. So each block gets a subclass with the
    function that was replaced, which mlx-lm keeps in a closure variable ``fn`` only.
    """
    for block in blocks:
        kind = type(block)
        block.__class__ = _class_without_checkpointing(kind, kind.__call__)


@cache
def _class_without_checkpointing(kind: type, call: Callable[..., Any]) -> type:
    """Return a class with the forward pass that it had; the class itself if that is unchanged.

    Args:
        kind: a class of blocks.
        call: its forward pass now; an argument, so that the cache notices when it is replaced.
    """
    original = call
    while getattr(original, "__module__", "") == "mlx_lm.tuner.trainer":
        original = inspect.getclosurevars(original).nonlocals["fn"]
    if original is call:
        return kind
    return type(kind.__name__, (kind,), {"__call__": original, "__module__": kind.__module__})


def run(module: nn.Module, tokens: mx.array, segments: mx.array | None) -> mx.array:
    """Return a model's logits ``(batch, length, vocabulary)``, packed rows kept apart.

    Args:
        module: an mlx-lm model.
        tokens: ``(batch, length)``.
        segments: ``(batch, length)``, number of the packed row of each token; None if not packed.
    """
    if segments is None:
        return module(tokens)
    blocks: Any = getattr(module, "layers", None) or module_at(module, _path_of_blocks(module))
    return module(tokens, cache=[PackedRowsCache(segments)] * len(blocks))


def _without_arrays(value: Any) -> Any:
    """Return what stands for a cache in a block's arguments, without the segments that it holds.

    A block gets its mask as an argument, and what it gets beside must hold no array, or a compiled
    block would keep that array.
    """
    return NO_CACHE if isinstance(value, PackedRowsCache) else value


def _path_of_blocks(module: nn.Module) -> str:
    """Path of the list that holds most modules, counted with what is in them."""
    best = ""
    most = 0
    for path, node in [("", module), *module.named_modules()]:
        for key, value in node.items():
            if not _is_list_of_modules(value):
                continue
            size = sum(len(list(x.modules())) for x in value)
            if size > most:
                best = f"{path}.{key}".lstrip(".")
                most = size
    if not best:
        raise UnsupportedError("The model has no list of blocks.")
    return best


def _is_list_of_modules(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, nn.Module) for x in value)
