"""What each panel shows, as a value."""
