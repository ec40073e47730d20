"""Numbers of updates on weights: norms, spectra, what survives rounding."""
