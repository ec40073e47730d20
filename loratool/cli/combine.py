"""`loratool combine`."""

from loratool.cli.options import ADAPTERS, MAKING, OUT, PUSHING, library_command
from loratool.commands.combine import combine as function
from loratool.reworking.combine_options import CombineOptions

combine = library_command(
    function,
    CombineOptions,
    ADAPTERS,
    OUT,
    help="""Combine several adapters of one base into one.

    METHOD is linear (exact: ranks add up), cat, svd, slerp, nuslerp, karcher, model_stock, ties, dare_linear,
    dare_ties, della, breadcrumbs, sce, magnitude_prune, tsv, iso_c, iso_cts, pico, or one of PEFT's methods on
    factors: linear-factors, ties-factors, dare_linear-factors, dare_ties-factors, magnitude_prune-factors.

    \b
    Examples:
      loratool combine ./style ./facts -o ./both -w 0.7 -w 1.2
      loratool combine ./a ./b ./c -o ./small --rank 32
      loratool combine ./a ./b ./c -o ./balanced --method pico --rule tsv
      loratool combine ./a ./b ./c -o ./ties --method ties --density 0.3 --space core
    """,
    pictures=True,
    progress=MAKING["combine"],
    push_progress=PUSHING,
)
