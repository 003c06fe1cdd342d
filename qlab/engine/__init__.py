"""Does the work on the one MLX thread; yields events; shows nothing, prints nothing."""
