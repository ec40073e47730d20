"""The command line: parse words, call one library function, print its report."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import warnings
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, NoReturn

import click

from loratool import __version__
from loratool.cli.operands import forgiving
from loratool.errors import (
    LoratoolError,
    StorageError,
    UsageError,
    escaped,
    printable,
    without_credentials,
    without_tokens,
)
from loratool.files.process import (
    is_unread,
    multiply_on_own_threads,
    on_stop,
    prepare_streams,
    silence_stdout,
)
from loratool.files.system import lacking

ESTIMATED = {"--rank": "8", "--target": "all-linear"}  # what `estimate` needs, with values to begin with

EXIT_CODES = """\b
Exit codes: 0 done · 1 a bug · 2 wrong usage · 3 an input is malformed or unsupported ·
4 the adapter does not fit the base · 5 verification failed · 6 disk error ·
7 Hub error · 130 interrupted · 143 terminated"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as for Ctrl-C, with its own exit status."""


COMMANDS = {  # name, which is its module's too → what the list of commands says of it
    "merge": "Merge adapters into a base model, shard by shard.",
    "verify": "Verify a merged model, whichever tool made it.",
    "inspect": "Show what adapters and checkpoints contain.",
    "index": "Keep sketches of many adapters in one file, to find the nearest.",
    "rescale": "Change the strength of an adapter.",
    "combine": "Combine several adapters of one base into one.",
    "resize": "Change the ranks of an adapter by SVD.",
    "compress": "Compress many adapters of one base together.",
    "expand": "Write one of the compressed adapters as an ordinary one.",
    "rebase": "Transfer an adapter to a sibling of its base.",
    "convert": "Write an adapter in the dialect of another tool.",
    "extract": "Extract an adapter from a full fine-tune.",
    "compare": "Measure how similar adapters are and how much they interfere.",
    "estimate": "Estimate an adapter's size and training memory before training it.",
    "plan": "Show what a merge would do, and how long N workers would take.",
    "record": "Print what an output was made of, as a bill of materials.",
    "reproduce": "Repeat the run that made an output, and compare all bytes.",
    "run": "Run the steps of a manifest that are not up to date.",
    "push": "Upload a finished model or adapter to the Hub.",
    "demo": "Build a small base and adapter, merge them and check the result.",
    "help": "Explain a topic, such as operands, memory or exit-codes.",
    "completion": "Complete words in bash, zsh or fish.",
}


HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
FEW_COLLECTIONS = 20_000  # new objects after which Python looks for garbage: nearly all of a command's stay to its end
EXTRA = re.compile(r"unexpected extra arguments? \((.+)\)")  # Click's words
MODULES = {"run": "manifest"}  # of commands whose module has another name


@cache
def command(name: str) -> click.Command:
    """A command by its name."""
    found: click.Command = getattr(import_module(f"loratool.cli.{MODULES.get(name, name)}"), name)
    found.context_settings = {**HELP, **found.context_settings}  # Click keeps what the first context had
    return forgiving(found)


def near_command(word: str) -> str:
    """The command that a word was probably meant to be, by its spelling or as other tools call it; empty for none."""
    from difflib import get_close_matches

    from loratool.cli.unknown_options import COMMANDS_KNOWN_AS

    known = next((meant for words, meant in COMMANDS_KNOWN_AS.items() if word.lower() in words), "")
    return known or next(iter(get_close_matches(word, COMMANDS, 1)), "")


class KeptError(Exception):
    """Carries an error past Click, as its cause. Click ends the process for a pipe that broke, whichever it was."""


class Commands(click.Group):
    """The commands, each imported when it is asked for: help and completion wait for none of them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (OSError, EOFError, SystemExit) as error:
            raise KeptError from error

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return command(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            meant = f"; did you mean {near!r}?" if (near := near_command(args[0])) else ""
            ctx.fail(f"there is no command {printable(repr(args[0]))}{meant}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


def show_schema(context: click.Context, _parameter: click.Parameter, name: str | None) -> None:
    """The schema of a command, and the end."""
    if name is None or context.resilient_parsing:
        return
    from loratool.cli.schemas import schema_of_command

    if name not in COMMANDS:
        meant = f"; did you mean {near!r}?" if (near := near_command(name)) else ""
        raise UsageError(f"--json-schema takes a command: {', '.join(COMMANDS)} (got {printable(repr(name))}){meant}")
    click.echo(json.dumps(schema_of_command(name, command(name)), indent=2, ensure_ascii=False))
    context.exit()


@click.group(
    cls=Commands,
    context_settings={**HELP, "max_content_width": 100},
    invoke_without_command=True,  # else Click's releases differ in what they do with the help
    subcommand_metavar="COMMAND [ARGS]...",
    epilog=EXIT_CODES,
)
@click.version_option(__version__, prog_name="loratool")
@click.option(
    "--json-schema",
    metavar="COMMAND",
    is_eager=True,
    expose_value=False,
    callback=show_schema,
    help="Print the JSON Schema of what COMMAND prints with --json.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Merge, inspect, resize, combine and publish LoRA adapters on checkpoint files, without loading the model.

    \b
    Example: loratool merge ./Llama-3.2-1B ./my-adapter -o ./merged
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(UsageError.exit_code)


stops: list[KeyboardInterrupt] = []  # that this process got; what is being imported may make another error of one


def stop(terminated: bool) -> NoReturn:
    """Stop in good order."""
    stops.append(Terminated() if terminated else KeyboardInterrupt())
    raise stops[-1]


def main() -> None:
    """Run the command line and end the process with the contract's exit code."""
    gc.set_threshold(FEW_COLLECTIONS)
    prepare_streams()
    multiply_on_own_threads()
    warnings.showwarning = show_warning
    on_stop(stop)
    code = run(sys.argv[1:])
    with suppress(OSError):
        sys.stderr.flush()
    if (opened := sys.modules.get("loratool.files.stand_ins")) is not None:
        opened.forget()
    os._exit(code)  # taking torch down in order costs half a second, and threads may be deep in a sync


def show_warning(message: Warning | str, *_place: object, **_more: object) -> None:
    """A warning of some library, which may repeat what a server says."""
    complain(f"warning: {without_tokens(str(message))}")


def complain(text: str) -> None:
    """A sentence on stderr, if anybody can read it."""
    with suppress(OSError):
        click.echo(escaped(text, keep="\n"), err=True)


def run(arguments: list[str]) -> int:
    """The exit code of `loratool ARGUMENTS`; reports go to stdout, errors to stderr.

    With `-v`, stderr also says what this system lacks that the command would have used.
    """
    if instruction := os.environ.get("_LORATOOL_COMPLETE"):
        from loratool.cli.completion import completed

        return completed(cli, instruction)
    verbose = bool({"-v", "-vv", "--verbose"} & set(arguments))
    lacking()  # what an earlier command of this process went without
    code = run_command(arguments, verbose)
    for sentence in lacking() if verbose else ():
        complain(f"note: {sentence}")
    return code


def run_command(arguments: list[str], verbose: bool) -> int:
    """The exit code of one command; `verbose` shows the traceback of a bug."""
    stops.clear()  # of a command before this one in the same process
    try:
        code = cli.main(args=arguments, prog_name="loratool", standalone_mode=False, obj=tuple(arguments))
        click.echo(nl=False)  # which flushes
        return code if isinstance(code, int) else 0  # what a command ended itself with
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return failed(arguments, UsageError(said_by(error), hint=step_after(error, arguments)), usage_of(error))
    except LoratoolError as error:
        return failed(arguments, error)
    except (KeyboardInterrupt, click.Abort) as error:
        return interrupted(arguments, error.__cause__ or error)  # Click passes every interrupt on as an Abort
    except SystemExit:  # which Click makes of a broken pipe while it reads the words: only help is written then
        silence_stdout()
        return 141
    except Exception as error:
        if stops:
            return interrupted(arguments, stops[-1])
        return unexpected(arguments, error.__cause__ or error if isinstance(error, KeptError) else error, verbose)


def interrupted(arguments: list[str], cause: BaseException) -> int:
    """The exit code of a command that was stopped."""
    goes_on = arguments[:1] in (["merge"], ["push"], ["run"])
    again = "run the same command again to continue" if goes_on else "nothing was written"
    complain(f"Interrupted; {cause.args[0] if cause.args else again}.")
    return 143 if isinstance(cause, Terminated) else 130


def unexpected(arguments: list[str], error: BaseException, verbose: bool) -> int:
    """The exit code of an error that is not loratool's own; only one whom nobody could read is not said."""
    if isinstance(error, BrokenPipeError) and is_unread():
        silence_stdout()
        return 141
    if isinstance(error, OSError):
        written = "could not write to stdout: " if is_of_writing(error) else ""
        where = f"{printable(error.filename)}: " if error.filename else written
        sentence = f"{where}{error.strerror or without_tokens(str(error))}"
        code = failed(arguments, StorageError(sentence, hint=same_command(arguments)))
        silence_stdout()  # which may be what is full
        return code
    if isinstance(error, MemoryError):
        sentence = "out of memory; lower --max-memory or --workers to make a merge use less"
        hint = "--max-memory 2GB" if arguments[:1] == ["merge"] else same_command(arguments)
        return failed(arguments, StorageError(sentence, hint=hint))
    if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU; its text says which one
        what = printable(". ".join(str(error).split(". ")[:3]))
        sentence = f"{what}; close other programs that use it, or pass --device cpu"
        return failed(arguments, StorageError(sentence, hint="--device cpu"))
    if verbose:
        import traceback

        complain(without_tokens("".join(traceback.format_exception(type(error), error, error.__traceback__))))
    sentence = f"this is a bug in loratool: {type(error).__name__}: {without_tokens(printable(error))}"
    way = "" if verbose else "-v"
    return failed(arguments, LoratoolError(f"{sentence}; please report it with the traceback", hint=way))


def is_of_writing(error: OSError) -> bool:
    """Whether an error is one of stdout, which it does not name: Click writes all texts, and nothing else."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and str(at.tb_frame.f_globals.get("__name__")).partition(".")[0] == click.__name__


def same_command(arguments: list[str]) -> str:
    """The same command."""
    from loratool.fetching.next_steps import typed

    return typed(*arguments)


def said_by(error: click.ClickException) -> str:
    """Click's sentence, but for an option that does not exist, of which Click compares the hyphens, too."""
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        from loratool.cli.unknown_options import sentence

        return sentence(escaped(error.option_name), error.ctx.command)
    return error.format_message().expandtabs(2)  # choices are listed with tabs


def usage_of(error: click.ClickException) -> str:
    """The line of a command's usage, where an error is about its words."""
    context = getattr(error, "ctx", None)
    return f"{context.get_usage()}\n\n" if context else ""


def step_after(error: click.ClickException, arguments: list[str]) -> str:
    """The next command after words that Click does not take: the one that was meant, or its help."""
    from loratool.fetching.next_steps import typed

    context = getattr(error, "ctx", None)
    word = next(iter(arguments), "")
    if context and context.parent is None and (near := near_command(word)):
        return typed(*near.split(), *arguments[1:])
    if context and isinstance(error, click.NoSuchOption):
        from loratool.cli.unknown_options import corrected

        if words := corrected(error.option_name, context.command, arguments):
            return typed(*words)
    if context and word == "estimate" and isinstance(error, click.MissingParameter):
        given = {argument.partition("=")[0] for argument in arguments}
        return typed(*arguments, *(each for pair in ESTIMATED.items() if pair[0] not in given for each in pair))
    if (
        context
        and (match := EXTRA.search(error.format_message()))
        and (step := with_extra(context, arguments, match[1]))
    ):
        return step
    path = context.command_path if context else " ".join(["loratool", *([word] if word in COMMANDS else ())])
    return f"{path} --help"


def with_extra(context: click.Context, arguments: list[str], extra: str) -> str:
    """The command with operands that it takes as options only: the output, or what `verify` compares with."""
    from loratool.fetching.next_steps import typed

    words = [word for word in arguments if word in extra.split()]
    rest = [word for word in arguments if word not in words]
    if context.info_name == "verify" and len(words) > 1 and "--base" not in rest:
        return typed(*rest, "--base", words[0], *(each for word in words[1:] for each in ("--adapter", word)))
    takes_output = any("-o" in option.opts for option in context.command.params)
    return typed(*rest, "-o", *words) if takes_output and len(words) == 1 and not {"-o", "--output"} & {*rest} else ""


def failed(arguments: list[str], error: LoratoolError, before: str = "") -> int:
    """The exit code of an error, which is said with the next command; with `--json` it is the object on stdout, too."""
    from loratool.fetching.next_steps import in_full

    step = without_credentials(in_full(error.hint, arguments))
    complain(f"{before}Error: {error}\nhint: {step}")
    if "--json" in arguments:
        from loratool.results.base import SCHEMA
        from loratool.results.failure import error_data

        with suppress(OSError):
            click.echo(json.dumps({"schema": SCHEMA, "error": error_data(error, step)}, indent=2))
    return error.exit_code
