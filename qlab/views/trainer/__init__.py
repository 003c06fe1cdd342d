"""The trainer panel: live and static."""
