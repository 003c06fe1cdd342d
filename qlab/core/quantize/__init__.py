"""Errors of layers as tables and reports; allocation; comparison."""
