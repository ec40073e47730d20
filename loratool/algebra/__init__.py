"""What an adapter does to a weight, as mathematics. No names, no files."""
