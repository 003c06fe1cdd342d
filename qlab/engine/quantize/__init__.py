"""Errors of every layer, what they cost in nats, and quantized models."""
