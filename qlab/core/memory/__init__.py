"""Memory estimates, the settings they are made for, and what to change so that a step fits."""
