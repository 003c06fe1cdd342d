"""Models on disk: open, save, GGUF."""
