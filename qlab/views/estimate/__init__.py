"""The estimate panel: live and static."""
