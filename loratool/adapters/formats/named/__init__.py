"""Adapters whose tensors' names say everything: those of image and video models, which come without a config.

`dialects` is the table of spellings: how names begin, which weight a module means, and which scale holds where there is
no alpha. `refused` names what no reader covers, `header` knows what tools write into a file's header, and `reading`
brings a file's tensors through all three.
"""

from loratool.adapters.formats.named.format import Named

__all__ = ["Named"]
