"""An adapter in another dialect: which rows go where, what is folded into factors, and the proof that nothing else changed."""
