"""Many adapters at once: which files they are, a row for each, conditions and order, and those that are the same."""
