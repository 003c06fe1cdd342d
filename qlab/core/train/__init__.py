"""Rows, events and reports of a training run."""
