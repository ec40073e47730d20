"""Numerics of low-rank matrices, which are known by their factors and never formed.

Pure torch: no names, no files. Everything takes batches: leading dimensions are modules of one shape, or experts.
"""
