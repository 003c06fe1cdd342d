"""Shelf: small trainable changes of frozen layers, one file each."""
