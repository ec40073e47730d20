"""What made a file: the record that is written and read, the command that repeats it, the card, and what is a secret."""
