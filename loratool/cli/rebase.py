"""`loratool rebase`."""

from loratool.cli.options import ADAPTER, MAKING, OUT, PUSHING, library_command
from loratool.commands.rebase import rebase as function
from loratool.reworking.rebasing.rebase import RebaseOptions

rebase = library_command(
    function,
    RebaseOptions,
    ADAPTER,
    OUT,
    help="""Transfer an adapter from the base that it was trained on to a sibling, such as a newer release.

    Both bases are compared where the adapter changes them. What the new one already holds of the update is taken off
    it. Limits come from toy models: test the adapter on its new base.

    \b
    Example: loratool rebase ./my-adapter --from ./base-v1 --onto ./base-v2 -o ./my-adapter-v2
    """,
    progress=MAKING["rebase"],
    push_progress=PUSHING,
)
