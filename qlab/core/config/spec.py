"""What a model is made of, without its weights: paths, shapes, dtypes, sizes.

Knows no framework: a spec can describe a model that does not exist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod

from qlab.core.config.quant import QuantConfig
from qlab.errors import LayerNotFoundError, nearest


@dataclass(frozen=True)
class LayerSpec:
    """One weight matrix that a scheme might store.

    Attributes:
        path: module path, such as ``model.layers.0.mlp.down_proj``.
        kind: ``linear``, ``embedding`` or ``switch`` (the experts of a mixture, one tensor).
        shape: ``(…, out, in)`` of the weight as numbers, whatever its packing.
        dtype: dtype name of the weight, or of its scales if it is stored quantized.
        itemsize: bytes of one element in that dtype.
        nbytes: bytes that the layer's weight takes now.
        stored: label of the quantized storage that the model already has, or None.
        tied: whether the output head uses this weight too (it is counted once).
        obstacle: why no scheme can store it, or None.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    itemsize: int = 2
    nbytes: int = 0
    stored: str | None = None
    tied: bool = False
    obstacle: str | None = None

    @cached_property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def block(self) -> int | None:
        """Index of the transformer block, or None outside the blocks."""
        found = re.search(r"\.(\d+)\.", self.path)
        return int(found.group(1)) if found else None

    @cached_property
    def role(self) -> str:
        """What the layer is within its block, such as ``mlp.down_proj``; equal for all blocks."""
        return (
            re.split(r"\.\d+\.", self.path, maxsplit=1)[-1] if self.block is not None else self.path
        )

    def refusal(self, config: QuantConfig) -> str | None:
        """Say why this config cannot store the layer, or return None if it can."""
        if self.obstacle:
            return self.obstacle
        if self.shape[-1] % config.group_size:
            return (
                f"input width {self.shape[-1]} is not a multiple of group size {config.group_size}"
            )
        return None

    def nbytes_as(self, config: QuantConfig | None) -> int:
        """Bytes of the weight under a config; as now if the config is None or cannot store it."""
        if config is None or self.refusal(config):
            return self.nbytes
        return config.scheme.nbytes(self.shape, config, self.itemsize)


@dataclass(frozen=True)
class ModelSpec:
    """A model without its weights.

    Attributes:
        name: what the user called it, shortened for headlines.
        layers: every weight matrix, in model order.
        other_nbytes: bytes of all other parameters (norms, biases).
        other_size: number of all other parameters.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    other_nbytes: int = 0
    other_size: int = 0

    @cached_property
    def by_path(self) -> dict[str, LayerSpec]:
        """Layers by path."""
        return {layer.path: layer for layer in self.layers}

    def __getitem__(self, path: str) -> LayerSpec:
        if path not in self.by_path:
            raise LayerNotFoundError(
                f"The model {self.name!r} has no layer {path!r}.{nearest(path, self.by_path)}"
            )
        return self.by_path[path]

    @cached_property
    def stored(self) -> str:
        """How the first quantized layer is stored, such as ``affine 4-bit g64``.

        Empty if none is quantized.
        """
        return next((layer.stored for layer in self.layers if layer.stored), "")

    @cached_property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows: rows of its largest embedding; None if no layer is one."""
        return max(
            (layer.shape[0] for layer in self.layers if layer.kind == "embedding"), default=None
        )

    @cached_property
    def size(self) -> int:
        """Number of parameters, each counted once."""
        return sum(layer.size for layer in self.layers) + self.other_size

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parameters as they are now."""
        return sum(layer.nbytes for layer in self.layers) + self.other_nbytes
