"""Anything with rows → tokens and targets → batches by number."""
