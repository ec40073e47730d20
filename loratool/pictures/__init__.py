"""Figures of results as SVG, and the pages that show them."""
