"""Side by side with the full model: loss, KL, answers."""
