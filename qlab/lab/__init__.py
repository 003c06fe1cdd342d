"""What a notebook holds: traits, sliders and code as one state; wiring only."""
