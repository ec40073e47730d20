"""`Adapter`, its layers, ranks and writer, and the dialects on disk that it is read from."""
