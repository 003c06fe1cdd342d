"""Gives memory back. Knows no model."""

from __future__ import annotations

import gc

import mlx.core as mx


def release(expected_nbytes: int) -> str:
    """Collect garbage and empty MLX's cache; say what came back and what did not."""
    before = mx.get_active_memory() + mx.get_cache_memory()
    gc.collect()
    mx.clear_cache()
    after = mx.get_active_memory() + mx.get_cache_memory()
    text = f"{max(before - after, 0) / 1e9:.3f} GB given back, {after / 1e9:.3f} GB still held by MLX."
    if after > 0.5 * expected_nbytes:
        text += " Other models, quantizers made from this one, or IPython's Out and _ may hold the rest."
    return text
