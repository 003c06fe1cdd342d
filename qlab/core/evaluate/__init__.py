"""Evaluations with errors and intervals."""
