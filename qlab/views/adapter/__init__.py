"""The adapter panel: live and static."""
