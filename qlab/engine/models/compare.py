"""How far two ways of computing the same arrays are apart."""

from __future__ import annotations

import mlx.core as mx

from qlab.ops.sums import stable_norm


def relative_distance(result: mx.array, expected: mx.array) -> float:
    """Return ‖result − expected‖ / ‖expected‖, computed at once; NaN if a number is none.

    The difference is taken in the arrays' own dtype, the norms in float32.
    """
    difference = (result - expected).astype(mx.float32)
    expected = expected.astype(mx.float32)
    distance = stable_norm(difference) / stable_norm(expected)
    return float(distance)
