"""A batch → loss and gradients, in one graph or a block at a time."""
