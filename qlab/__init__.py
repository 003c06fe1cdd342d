"""qlab: a notebook-native laboratory for quantized LLMs on MLX."""

__version__ = "0.1.0"
