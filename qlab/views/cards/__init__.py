"""Cards: comparison, data, judgement, runs."""
