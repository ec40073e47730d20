"""Tables of how models name and arrange their weights: data, no logic."""
