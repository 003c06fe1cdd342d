"""Cards: comparison, data, evaluation, runs."""
