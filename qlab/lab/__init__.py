"""What a notebook holds: traits, sliders and code as one state; wiring only."""

import qlab.views  # noqa: F401  # whatever a lab object returns shows itself in a cell
