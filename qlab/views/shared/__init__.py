"""What every view is made of: the wire, charts, the panel script and its styles."""
