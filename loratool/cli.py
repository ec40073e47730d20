"""The command line: parse words, call one library function, print its report."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import click

from loratool import __version__
from loratool.errors import LoratoolError, printable

Command = TypeVar("Command", bound=Callable[..., None])
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
PATH = click.Path(path_type=Path, readable=False)  # what is wrong with a path, the library says better
EXIT_CODES = """\b
Exit codes: 0 done · 1 a bug · 2 wrong usage · 3 an input is malformed or unsupported ·
4 the adapter does not fit the base · 5 verification failed · 6 the disk said no ·
7 the Hub said no · 130 interrupted · 143 terminated"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as for Ctrl-C, with its own exit status."""


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of bytes: 5GB, 512MiB, 1000000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", str(value).strip().lower())
        if not match or match[2] not in UNITS:
            self.fail(f"{printable(repr(value))} is no size such as 5GB, 512MiB or 1000000", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


def output_options(command: Command) -> Command:
    """`--json`, `-q` and `-v`, which every command has."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, expose_value=False, help="Show the traceback of a bug."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no report, errors only."),
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr."),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="loratool")
def cli() -> None:
    """Merge and inspect LoRA adapters on checkpoint files, without loading the model.

    \b
    Example: loratool merge ./Llama-3.2-1B ./my-adapter -o ./merged
    """


@cli.command()
@click.argument("base", type=PATH)
@click.argument("adapters", type=PATH, nargs=-1, required=True, metavar="ADAPTER...")
@click.option("-o", "--output", "out", type=PATH, required=True, metavar="OUT", help="Folder to make.")
@click.option(
    "-w", "--weight", "weights", type=float, multiple=True, help="Strength, once per adapter in order [default: 1]."
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "float32", "bfloat16", "float16"]),
    default="keep",
    show_default=True,
    help="Dtype of every float tensor written.",
)
@click.option(
    "--map",
    "maps",
    multiple=True,
    metavar="REGEX=TEMPLATE",
    help="Another name for the adapters' weights in which REGEX is found, as in re.sub; may be repeated.",
)
@click.option(
    "--fan-in-fan-out/--no-fan-in-fan-out",
    default=None,
    help="Whether square weights that nothing else decides are stored (in, out).",
)
@click.option(
    "--shard-size", type=Size(), help="Tensor bytes per output file, such as 5GB [default: the base's shards]."
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Threads [default: two more than cores, at most 16].")
@click.option("--max-memory", type=Size(), help="Resident memory to stay under, such as 400MB.")
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it is a model already.")
@click.option("--allow-new-tensors", is_flag=True, help="Add heads that an adapter saved and BASE has not.")
@output_options
def merge(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path,
    weights: tuple[float, ...],
    device: str,
    dtype: str,
    maps: tuple[str, ...],
    fan_in_fan_out: bool | None,
    shard_size: int | None,
    workers: int | None,
    max_memory: int | None,
    dry_run: bool,
    overwrite: bool,
    allow_new_tensors: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fold adapters into a base model, shard by shard.

    BASE is a model folder or one .safetensors file, ADAPTER a folder as PEFT saves it. OUT becomes
    a complete model folder: weights, index, config, tokenizer. Nothing of it exists under its name
    until everything does; the same command after an interruption continues.

    \b
    Examples:
      loratool merge ./Llama-3.2-1B ./my-adapter -o ./merged
      loratool merge ./base ./style ./facts -w 0.7 -w 1.2 -o ./merged --shard-size 5GB
      loratool merge ./merged ./my-adapter -w -1 -o ./base-again
      loratool merge ./base ./my-adapter -o ./merged --map '^model[.]text[.]=model.'
    """
    from loratool.merging import merge, plan

    if dry_run:
        planned = plan(
            base,
            adapters,
            out,
            weights=weights,
            dtype=dtype,
            maps=maps,
            fan_in_fan_out=fan_in_fan_out,
            shard_size=shard_size,
            overwrite=overwrite,
            allow_new_tensors=allow_new_tensors,
        )
        from loratool.report import plan_data, plan_text
        from loratool.resources import estimated_memory

        memory = estimated_memory(planned, device, workers, max_memory)
        show(plan_data(planned, memory), lambda: plan_text(planned, memory), as_json, quiet)
        return
    with progress_bar(quiet) as progress:
        report = merge(
            base,
            adapters,
            out,
            weights=weights,
            device=device,
            dtype=dtype,
            maps=maps,
            fan_in_fan_out=fan_in_fan_out,
            shard_size=shard_size,
            workers=workers,
            max_memory=max_memory,
            overwrite=overwrite,
            allow_new_tensors=allow_new_tensors,
            progress=progress,
        )
    show(report, lambda: str(report), as_json, quiet)


@cli.command()
@click.argument("paths", type=PATH, nargs=-1, required=True, metavar="PATH...")
@output_options
def inspect(paths: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Tell what is in an adapter or a checkpoint, from headers alone.

    \b
    Example: loratool inspect ./my-adapter ./Llama-3.2-1B
    """
    from loratool.inspecting import inspect

    facts = [inspect(path) for path in paths]
    show({"results": facts}, lambda: "\n\n".join(map(str, facts)), as_json, quiet)


@cli.command(short_help="Make, merge and check a small model from nothing.")
@click.argument("folder", type=PATH, default=Path("loratool-demo"), metavar="[DIR]")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier demo left in DIR.")
@output_options
def demo(folder: Path, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Build a small base and an adapter, merge them, and check the result against the formula.

    \b
    Example: loratool demo ./loratool-demo
    """
    from loratool.demo import demo

    result = demo(folder, overwrite=overwrite)
    show(result, lambda: str(result), as_json, quiet)


def show(data: Any, text: Callable[[], str], as_json: bool, quiet: bool) -> None:
    """Print a report on stdout, as JSON or as text."""
    from loratool.report import plain

    if as_json:
        click.echo(json.dumps(plain(data), indent=2))
    elif not quiet:
        click.echo(text())


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A tqdm bar in bytes on stderr, or None where nobody is looking."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit="B", unit_scale=True, desc="merging", file=sys.stderr, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def on_signal(number: int, _frame: FrameType | None) -> NoReturn:
    """Stop in good order; a second one ends the process there and then, whatever it is doing."""
    signal.signal(number, signal.SIG_DFL)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def main() -> None:
    """Run the command line and end the process with the contract's exit code."""
    open_streams()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)
    code = run(sys.argv[1:])
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # taking torch down in order costs half a second, and threads may be deep in a sync


def open_streams() -> None:
    """Give closed standard streams to the null device; else the next file opened would get their number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def complain(text: str) -> None:
    """A sentence on stderr, if anybody can read it."""
    with suppress(OSError):
        click.echo(text, err=True)


def run(arguments: list[str]) -> int:
    """The exit code of `loratool ARGUMENTS`; reports go to stdout, errors to stderr."""
    try:
        cli.main(args=arguments, prog_name="loratool", standalone_mode=False)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return error.exit_code
    except LoratoolError as error:
        complain(f"Error: {error}")
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        again = "; the same command continues with the files that are finished"
        complain(f"Interrupted{again}.")
        # Click passes every interrupt on as an Abort
        return 143 if isinstance(error.__cause__ or error, Terminated) else 130
    except (BrokenPipeError, SystemExit):  # Click turns a broken pipe into an exit of its own
        silence_stdout()
        return 141
    except OSError as error:
        silence_stdout()
        where = f"{printable(error.filename)}: " if error.filename else ""
        complain(f"Error: {where}{error.strerror or error}")
        return 6
    except MemoryError:
        complain("Error: out of memory; --max-memory and --workers make a merge smaller")
        return 6
    except Exception as error:
        if {"-v", "--verbose"} & set(arguments):
            import traceback

            traceback.print_exc()
        complain(f"Error: this is a bug in loratool: {type(error).__name__}: {printable(error)}")
        complain("Run it again with -v for the traceback, and please report it.")
        return 1


def silence_stdout() -> None:
    """Let the interpreter's last flush go nowhere, for stdout is closed or full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main()
