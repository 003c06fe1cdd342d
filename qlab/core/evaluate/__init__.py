"""Judgements with errors and intervals."""
