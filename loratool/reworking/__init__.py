"""Adapters out of adapters: rescale, resize, combine, extract, compare."""
