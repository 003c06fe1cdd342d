"""Modules in memory: skeletons, blocks, surgery."""
