"""What a model is made of, without its weights: paths, shapes, dtypes, sizes, present storage.

``engine/models/skeleton.py`` describes a model with it; panels, estimates and adapters ask it which
layers there are. Knows no framework: a spec can describe a model that does not exist.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import prod

from qlab.core.config.quant import QuantConfig
from qlab.errors import LayerNotFoundError, nearest


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One weight matrix that a scheme might store.

    Attributes:
        path: module path, such as ``model.layers.0.mlp.down_proj``.
        kind: ``linear``, ``embedding`` or ``switch`` (the experts of a mixture, one tensor).
        shape: ``(…, out, in)`` of the dequantized weight, whatever its packing.
        dtype: dtype name of the weight, or of its scales if it is stored quantized.
        itemsize: bytes of one element in that dtype.
        nbytes: bytes that the layer's weight takes now.
        storage: how the model stores it now; None if it is not quantized.
        tied: whether the output head uses this weight too (it is counted once).
        obstacle: why no scheme can store it, or None.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    _: KW_ONLY
    dtype: str = "bfloat16"
    itemsize: int = 2
    nbytes: int = 0
    storage: QuantConfig | None = None
    tied: bool = False
    obstacle: str | None = None

    @property
    def storage_label(self) -> str | None:
        """How it is stored now, such as ``affine 4-bit g64``; None if it is not quantized."""
        return self.storage.label if self.storage else None

    @cached_property
    def size(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def block(self) -> int | None:
        """Index of the transformer block, or None outside the blocks."""
        number = re.search(r"\.(\d+)\.", self.path)
        return int(number.group(1)) if number else None

    @cached_property
    def role(self) -> str:
        """What the layer is within its block, such as ``mlp.down_proj``; equal for all blocks."""
        if self.block is None:
            return self.path
        return re.split(r"\.\d+\.", self.path, maxsplit=1)[-1]

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
    """A model without its weights: its layers, and the size of everything else.

    Example:
        >>> spec = model.spec
        >>> spec["model.layers.0.mlp.down_proj"].shape
        (2048, 6144)
        >>> len(spec.blocks), spec.storage_label
        (28, '16-bit')

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
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the transformer blocks, ascending."""
        return tuple(sorted({layer.block for layer in self.layers if layer.block is not None}))

    @cached_property
    def storage(self) -> QuantConfig | None:
        """How the first quantized layer is stored; None if no layer is quantized."""
        return next((layer.storage for layer in self.layers if layer.storage), None)

    @property
    def storage_label(self) -> str:
        """How the weights are stored, such as ``affine 4-bit g64``, or ``16-bit``."""
        return self.storage.label if self.storage else "16-bit"

    @cached_property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows: rows of its largest embedding; None if no layer is one."""
        rows = [layer.shape[0] for layer in self.layers if layer.kind == "embedding"]
        return max(rows, default=None)

    @cached_property
    def size(self) -> int:
        """Number of parameters, each counted once."""
        return sum(layer.size for layer in self.layers) + self.other_size

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parameters as they are now."""
        return sum(layer.nbytes for layer in self.layers) + self.other_nbytes
