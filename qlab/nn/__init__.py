"""Layers: linear, experts, low rank, stored."""
