"""Shelf: optimizers, one file each. Each knows the bytes that it keeps for a parameter."""
