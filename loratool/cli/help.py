"""`loratool help`."""

from __future__ import annotations

import click

from loratool.cli.options import library_command
from loratool.cli.topics import TOPICS, list_of_topics, text_of
from loratool.errors import UsageError, printable
from loratool.options.described import Options, nearest
from loratool.results.texts import HelpText


def show_topic(topic: str = "") -> HelpText:
    """The text of a topic or a command; a list of the topics where none is named."""
    if topic in TOPICS:
        return HelpText(topic, text_of(topic))
    parent = click.get_current_context().find_root()
    commands = commands_of(parent)
    if topic in commands:
        own = commands[topic]
        return HelpText(topic, own.get_help(click.Context(own, parent, topic)))
    words = [*TOPICS, *commands]
    if topic:
        meant = nearest(topic, words)
        raise UsageError(
            f"there is no topic {printable(repr(topic))}; topics are {', '.join(TOPICS)}",
            hint=f"loratool help {meant}" if meant else "loratool help",
        )
    return HelpText("", list_of_topics())


def commands_of(context: click.Context) -> dict[str, click.Command]:
    """Every command by its name."""
    group = context.find_root().command
    assert isinstance(group, click.Group)
    found = ((name, group.get_command(context, name)) for name in group.list_commands(context))
    return {name: command for name, command in found if command}


def topics(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    return [word for word in (*TOPICS, *commands_of(context)) if word.startswith(incomplete)]


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
