"""Shelf: how codes are chosen for a format, one file a solver."""
