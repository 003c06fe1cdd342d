"""The peak of a step, before it is run."""
