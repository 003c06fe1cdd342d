"""The quantizer panel: live and static."""
