"""Values and arithmetic: configs, specs, metrics, tables, reports.

No mlx, no mlx_lm, no widget, no disk.
"""
