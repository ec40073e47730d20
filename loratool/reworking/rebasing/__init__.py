"""An adapter carried from the base that it was trained on to a sibling of it."""
