"""The loop, its runs on disk, and several processes that make one run."""
