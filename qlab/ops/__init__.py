"""Functions of arrays, with gradients of their own."""
