"""`loratool merge`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratool.cli.operands import Output, Place, UnlessGiven, complain_of, read_adapters, without_output
from loratool.cli.options import A_MODEL, AN_ADAPTER, BYTES, PATH, click_options, output_options, with_pictures
from loratool.cli.pictures import Pictures
from loratool.cli.screen import Screen
from loratool.commands.merge import MergeAndPushOptions, merge_anywhere
from loratool.commands.publish import with_push
from loratool.errors import UsageError, printable
from loratool.options.described import FLAG, described_by, option
from loratool.options.sharing import SHARE, Share

if TYPE_CHECKING:
    from loratool.results.base import Result
    from loratool.results.merge_many import MergeManyReport, ResultsOfOutputs
    from loratool.results.plan import MergePlan
    from loratool.results.stream import StreamReport


@dataclass(frozen=True, kw_only=True)
class MergeWords(MergeAndPushOptions):
    """Of the command, whose ways are functions of their own in the library: `plan`, `stream`, `merge_part` and more."""

    part: Share | None = option(  # noqa: RUF009 (it makes a field)
        help="Do the work of worker I of N, counted from 1, in an OUT on a file system that all workers share; auto "
        "takes both from SLURM_ARRAY_TASK_ID or RANK, auto/N takes I from JOB_COMPLETION_INDEX.",
        kind=SHARE,
        recorded=False,
    )
    finish: bool = option(
        help="Once all workers have ended: check every part, write the small files and publish OUT.",
        default=False,
        kind=FLAG,
        recorded=False,
    )
    status: bool = option(
        help="Print which parts of OUT are done, missing and being made; write nothing.",
        default=False,
        kind=FLAG,
        recorded=False,
    )
    stream: bool = option(
        help="Without OUT: fetch, merge and upload file by file, with at most two files on disk.",
        default=False,
        kind=FLAG,
    )
    card: bool = option(
        help="With --stream: write a generated README.md, even if BASE has one.", default=False, kind=FLAG
    )
    dry_run: bool = option(help="Print the plan; write nothing.", default=False, kind=FLAG)
    abort: bool = option(
        help="Remove what an unfinished merge in parts, or any unfinished output in a store, left behind; no BASE is "
        "needed.",
        default=False,
        kind=FLAG,
    )


@click.command()
@click.argument("base", type=Place("model", given="named_base", then="adapter"), cls=UnlessGiven, flag="abort")
@click.argument("adapters", type=AN_ADAPTER, nargs=-1, metavar="ADAPTER...")
@click.option(
    "-o",
    "--output",
    "out",
    type=PATH,
    cls=Output,
    metavar="OUT",
    help="Output folder, or s3://bucket/prefix; a file if BASE is one file.",
)
@click.option(
    "--base",
    "named_base",
    type=A_MODEL,
    metavar="BASE",
    help="Pass BASE as an option, so that every operand is an ADAPTER. auto means the base that the adapters name.",
)
@click.option(
    "--also",
    multiple=True,
    metavar="OUT=ADAPTER",
    help="Also write the merge of BASE and ADAPTER as another output, reading BASE once for all; may be repeated. "
    "The ADAPTERs of one OUT are merged together.",
)
@click_options(MergeWords)
@with_pictures(MergeWords)
@output_options
def merge(
    base: Path,
    adapters: tuple[Path, ...],
    out: Path | None,
    named_base: Path | None,
    also: tuple[str, ...],
    options: MergeWords,
    screen: Screen,
    pictures: Pictures,
) -> None:
    """Merge adapters into a base model, shard by shard.

    BASE is a model folder, a diffusers pipeline, or one .safetensors or .gguf file; ADAPTER is a folder saved by
    PEFT, or a file from kohya, ComfyUI, llama.cpp or another tool. Either may be org/name[@revision] on the Hub, and BASE
    may be auto. A single ADAPTER is merged into the base it names; a model saved with its adapter unmerged needs no
    ADAPTER. OUT becomes a complete model folder: weights, index, config, tokenizer; or one file like BASE. It appears
    only when it is complete; after an interruption, run the same command again to continue.

    \b
    Examples:
      loratool merge ./Llama-3.2-1B ./my-adapter -o ./merged
      loratool merge ./sdxl.safetensors ./style.safetensors -w 0.8 -o ./styled.safetensors
      loratool merge ./base ./style ./facts -w 0.7 -w 1.2 -o ./merged --shard-size 5GB
      loratool merge ./merged ./my-adapter -w -1 -o ./base-again
      loratool merge ./base ./my-adapter -o ./merged --html merged.html --svg ./figures
      loratool merge ./base ./my-adapter -o ./merged --map "^model[.]text[.]=model."
      loratool merge ./saved-unmerged -o ./merged --input-alpha 16
      loratool merge ./base ./style -o ./styled --also ./chatty=./chat --also ./both=./style --also ./both=./chat
      loratool merge auto me/my-adapter -o ./merged --push-to-hub me/merged
      loratool merge meta-llama/Llama-3.1-70B me/my-adapter --stream --push-to-hub me/merged
      loratool merge ./base ./my-adapter -o /shared/merged --part 3/8
      loratool merge ./base ./my-adapter -o /shared/merged --finish
    """
    if named_base is not None:  # then BASE is an ADAPTER too
        base, adapters = named_base, (base, *adapters)
    options.check_cluster()
    check_ways(also, options, pictures)
    if also and (options.stream or options.push_to_hub is not None):
        raise UsageError("--also cannot be used with --stream or --push-to-hub; push each output with `loratool push`")
    report: Result
    if options.stream:
        report = stream_to_hub(base, adapters, out, options, screen)
    elif out is None:
        raise without_output(click.get_current_context())
    elif options.card:
        raise UsageError("--card needs --stream; without it, run `loratool push --card`", hint="loratool push --help")
    elif options.abort:
        from loratool.merging.in_parts import abort, idle_notes

        idle = idle_notes("--abort", [flag for flag in options.given() if flag != "--abort"])
        report = dataclasses.replace(abort(out), notes=idle)
    elif also:
        merge_several(base, outputs_of(out, adapters, also, screen.quiet), options, screen, pictures)
        return
    elif options.part or options.finish or options.status:
        merge_in_parts(base, adapters, out, options, screen, pictures)
        return
    elif options.dry_run:
        from loratool.merging.dry_run import dry_run

        report = dry_run(base, adapters, out, options)
    else:
        with screen.bar("merging", **BYTES) as progress, screen.bar("pushing", **BYTES) as push_progress:
            report = with_push(merge_anywhere, (base, adapters, out), options, progress, push_progress, is_merge=True)
    screen.show(report)
    pictures.write(report)


def check_ways(also: tuple[str, ...], options: MergeWords, pictures: Pictures) -> None:
    """Raise `UsageError` where a merge in parts is to be another kind of merge, too."""
    ways = {
        "--part": options.part is not None,
        "--finish": options.finish,
        "--status": options.status,
        "--abort": options.abort,
    }
    chosen = [flag for flag, given in ways.items() if given]
    publishes = chosen == ["--finish"]
    others = {
        "--also": bool(also),
        "--stream": options.stream,
        "--dry-run": options.dry_run,
        "--card": options.card,
        "--html": pictures.html is not None and not publishes,
        "--svg": pictures.svg is not None and not publishes,
        "--push-to-hub": options.push_to_hub is not None and not publishes,
    }
    if chosen and (beside := [*chosen[1:], *(flag for flag, given in others.items() if given)]):
        more = "; pass --push-to-hub with --finish" if beside == ["--push-to-hub"] else ""
        raise UsageError(f"{chosen[0]} and {beside[0]} are mutually exclusive{more}")


def merge_in_parts(
    base: Path, adapters: tuple[Path, ...], out: Path, options: MergeWords, screen: Screen, pictures: Pictures
) -> None:
    """`--part`, `--finish` and `--status`."""
    from loratool.merging.in_parts import finish, merge_part, merge_status

    if options.status:
        screen.show(merge_status(base, adapters, out, options))
    elif options.part is not None:
        with screen.bar(f"merging {options.part}", **BYTES) as progress:
            screen.show(merge_part(base, adapters, out, options, options.part, progress))
    else:
        with screen.bar("checking", **BYTES) as progress, screen.bar("pushing", **BYTES) as push_progress:
            report = with_push(finish, (base, adapters, out), options, progress, push_progress, is_merge=True)
        screen.show(report)
        if report.merge is not None:
            pictures.write(report.merge)


def outputs_of(out: Path, adapters: tuple[Path, ...], also: tuple[str, ...], quiet: bool) -> dict[Path, list[Path]]:
    """The adapters of every output, from the words of `--also`; what they are read as is said unless `quiet`."""
    outputs = {out: [*adapters]}  # by the folder's name; one that is named twice gets both adapters
    pairs = [word.partition("=") for word in also]
    for word, (name, sign, adapter) in zip(also, pairs, strict=True):
        if not (name and sign and adapter):
            raise UsageError(f"--also takes OUT=ADAPTER (got {printable(repr(word))})")
        if os.path.realpath(name) == os.path.realpath(out):
            raise UsageError(f"--also {printable(word)}: OUT is the same as that of -o; pass its ADAPTERs as arguments")
    others = read_adapters([adapter for _, _, adapter in pairs], quiet)
    for (name, _, _), other in zip(pairs, others, strict=True):
        outputs.setdefault(Path(name), []).append(other)
    return outputs


def merge_several(
    base: Path, outputs: dict[Path, list[Path]], options: MergeWords, screen: Screen, pictures: Pictures
) -> None:
    """`--also`: all outputs, or their plans; ends with the worst exit code of those that fail."""
    from loratool.merging.merge_many import merge_many, plan_many

    if options.weights:
        raise UsageError(
            "-w cannot be used with --also; in Python, loratool.merge_many takes a weight for each adapter"
        )
    for out in outputs:
        pictures.check(out)
    result: MergeManyReport | ResultsOfOutputs[MergePlan]
    if options.dry_run:
        result = plan_many(base, outputs, options)
    else:
        with screen.bar("merging", **BYTES) as progress:
            result = merge_many(base, outputs, options, progress)
    for out, adapters in outputs.items():
        if error := result.errors.get(os.fspath(out)):
            complain_of(error, os.fspath(out), adapters)
    if result.reports or screen.as_json:
        screen.show(result, dataclasses.replace(result, errors={}))  # which were told on stderr
    if result.reports:
        pictures.write(result)
    click.get_current_context().exit(result.exit_code)


def stream_to_hub(
    base: Path, adapters: tuple[Path, ...], out: Path | None, options: MergeWords, screen: Screen
) -> StreamReport:
    """`--stream`: no folder is made, and the files keep the base's sizes."""
    if out is not None or options.shard_size is not None:
        raise UsageError(
            "--stream writes no folder and keeps the base's shards, so it takes neither -o nor --shard-size"
        )
    if options.push_to_hub is None:
        raise UsageError("--stream needs --push-to-hub REPO, the repository to upload to", hint="--push-to-hub REPO")
    from loratool.publishing.streaming import StreamOptions, stream

    chosen = StreamOptions(
        **{name: getattr(options, name) for name in described_by(StreamOptions) if hasattr(options, name)}
    )
    with screen.bar("merging", **BYTES) as progress:
        return stream(base, adapters, options.push_to_hub, chosen, progress)
