"""A step as a graph: read, put together, ordered, simulated, and turned into formulas."""
