"""Shelf: how numbers are stored, one file a format."""
