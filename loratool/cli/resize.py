"""`loratool resize`."""

from loratool.cli.options import ADAPTER, MAKING, OUT, PUSHING, library_command
from loratool.commands.resize import resize as function
from loratool.reworking.resize import ResizeOptions

resize = library_command(
    function,
    ResizeOptions,
    ADAPTER,
    OUT,
    help="""Change the ranks of an adapter by SVD: each layer gets the best approximation at its new rank.

    \b
    Examples:
      loratool resize ./my-adapter -o ./small --rank 8
      loratool resize ./my-adapter -o ./small --energy 0.99 --uniform
      loratool resize ./my-adapter -o ./small --budget 16MB
    """,
    pictures=True,
    progress=MAKING["resize"],
    push_progress=PUSHING,
)
