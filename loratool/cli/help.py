"""`loratool help`."""

from __future__ import annotations

import click

from loratool.cli import COMMANDS, command
from loratool.cli.options import library_command
from loratool.cli.topics import TOPICS, list_of_topics, text_of
from loratool.errors import UsageError, printable
from loratool.options.described import Options, nearest
from loratool.results.texts import HelpText


def show_topic(topic: str = "") -> HelpText:
    """The text of a topic or a command; a list of the topics where none is named."""
    if topic in TOPICS:
        return HelpText(topic, text_of(topic))
    if topic in COMMANDS:
        parent, own = click.get_current_context().find_root(), command(topic)
        return HelpText(topic, own.get_help(click.Context(own, parent, topic)))
    if topic:
        meant = nearest(topic, [*TOPICS, *COMMANDS])
        raise UsageError(
            f"there is no topic {printable(repr(topic))}; topics are {', '.join(TOPICS)}",
            hint=f"loratool help {meant}" if meant else "loratool help",
        )
    return HelpText("", list_of_topics())


def topics(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [word for word in (*TOPICS, *COMMANDS) if word.startswith(incomplete)]


help = library_command(
    show_topic,
    Options,
    click.argument("topic", required=False, metavar="[TOPIC]", shell_complete=topics),
    help="""Explain a topic in a screenful; without TOPIC, list the topics.

    TOPIC is operands, dialects, quantised, memory, rounding, exit-codes, hub, json, servers, learning, or a command.

    \b
    Example: loratool help operands
    """,
    name="help",
)
