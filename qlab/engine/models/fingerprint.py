"""A hash of a model's weights, from the first numbers of each array.

A stored run names its base by it, so that it is resumed on the same weights only.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

_PROBED = 64  # numbers of each array that are read


def fingerprint(module: nn.Module) -> str:
    """Return a hash of every array's path, shape, dtype and first numbers.

    Runs on the MLX thread.
    """
    parameters: dict[str, Any] = dict(tree_flatten(module.parameters()))
    arrays = sorted(parameters.items())
    heads = [array.reshape(-1)[:_PROBED].astype(mx.float32) for _, array in arrays]
    mx.eval(heads)
    digest = sha256()
    for (path, array), head in zip(arrays, heads, strict=True):
        digest.update(f"{path} {array.shape} {array.dtype}".encode())
        digest.update(np.array(head).tobytes())
    return digest.hexdigest()
