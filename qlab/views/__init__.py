"""Draws frozen reports as text, HTML and live widget; emits intents; never sees a model."""
