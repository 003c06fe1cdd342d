"""Adapters: attached, started, fused, and their files."""
