"""`loratool rescale`."""

from loratool.cli.options import ADAPTER, MAKING, OUT, PUSHING, library_command
from loratool.commands.rescale import rescale as function
from loratool.reworking.rescale import RescaleOptions

rescale = library_command(
    function,
    RescaleOptions,
    ADAPTER,
    OUT,
    help="""Change the strength of an adapter.

    Without --bake only alpha changes and the tensors stay the same. With --bake the scaling is multiplied into the
    factors, for servers that read only alpha and r.

    \b
    Examples:
      loratool rescale ./my-adapter -o ./weaker --scale 0.5
      loratool rescale ./my-adapter -o ./even --spectral 1 --each
      loratool rescale ./my-adapter -o ./plain --bake --match mlp=0.8
    """,
    progress=MAKING["rescale"],
    push_progress=PUSHING,
)
