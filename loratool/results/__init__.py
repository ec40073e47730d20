"""Every result of a command as plain data with its own text."""
