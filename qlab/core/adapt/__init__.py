"""What an adapter recovers, and how much of it a merge retains."""
