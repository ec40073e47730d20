"""`loratool completion`, and what a shell asks for while a command is typed."""

from __future__ import annotations

import click

from loratool.cli.options import library_command
from loratool.options.described import Options
from loratool.results.texts import CompletionScript

VARIABLE = "_LORATOOL_COMPLETE"  # by which the script of a shell asks for words
INSTALLED = {
    "bash": 'eval "$(loratool completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(loratool completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "loratool completion fish > ~/.config/fish/completions/loratool.fish",
}


def script_of(shell: str) -> CompletionScript:
    """The script that completes loratool's words in a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(click.get_current_context().find_root().command, {}, "loratool", VARIABLE)
    return CompletionScript(shell, f"# {INSTALLED[shell]}\n{script.source_template % script.source_vars()}".strip())


def completed(cli: click.Command, instruction: str) -> int:
    """Print the words of a command that fit what a shell has so far; the exit code."""
    from click.shell_completion import shell_complete

    return shell_complete(cli, {}, "loratool", VARIABLE, instruction)


completion = library_command(
    script_of,
    Options,
    click.argument("shell", type=click.Choice([*INSTALLED]), metavar="bash|zsh|fish"),
    help="""Print a script that completes commands, options, dialects, servers and target modules.

    For bash and zsh, add the line below to your shell's start-up file. For fish, write the script to
    ~/.config/fish/completions/loratool.fish.

    \b
    Examples:
      eval "$(loratool completion bash)"
      eval "$(loratool completion zsh)"
      loratool completion fish
    """,
    name="completion",
)
