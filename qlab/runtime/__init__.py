"""The MLX thread, devices, limits, files and caches."""
