"""An adapter out of the difference of two checkpoints."""
