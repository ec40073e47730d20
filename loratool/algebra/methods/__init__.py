"""How several updates of one weight become one. Pure torch: no names, no files.

A method needs inner products only (`coefficients`), singular vectors in core space (`spectral`), every entry
(`elementwise`, over `stacks`), or it treats the factors as such (`factorwise`). `table` lists them all.
"""
