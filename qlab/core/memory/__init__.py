"""Estimates of memory, what they are asked of, and what to change."""
