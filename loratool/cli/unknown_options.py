"""Options and commands that do not exist: what other tools and commands call those that do, and near spellings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

# Words that people know from other tools, or from another command here → the options that they may mean, in order.
KNOWN_AS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("w", "weight", "weights", "strength", "multiplier", "scale", "scaling", "ratio", "lora-scale"): (
        "--scale",
        "--weight",
    ),
    ("out", "out-dir", "outdir", "output-dir", "output-path", "out-path", "outfile", "save-path", "save-to"): (
        "--output",
    ),
    ("force", "f", "y", "yes", "replace", "overwrite-output"): ("--overwrite",),
    ("r", "lora-r", "lora-rank", "new-rank", "target-rank", "dim", "network-dim", "max-rank"): ("--rank",),
    ("alpha", "lora-alpha", "network-alpha"): ("--alpha", "--input-alpha"),
    ("format", "output-format", "dialect", "type"): ("--to",),
    ("precision", "save-precision", "torch-dtype", "outtype", "out-dtype", "type"): ("--dtype",),
    ("model", "base-model", "base-model-name-or-path", "model-path"): ("--base",),
    ("base", "old-base"): ("--from",),  # of rebase, whose library function calls it so
    ("new-base", "target-base"): ("--onto",),
    ("lora", "lora-path", "adapters", "peft-model"): ("--adapter",),
    ("threads", "jobs", "j", "num-workers", "num-threads"): ("--workers",),
    ("max-shard-size",): ("--shard-size",),
    ("hub", "push", "repo", "hub-model-id", "repo-id"): ("--push-to-hub",),
    ("n", "test", "simulate"): ("--dry-run",),
    ("cpu", "cuda", "gpu"): ("--device",),
}
# The same of commands, with the option that one of them needs.
COMMANDS_KNOWN_AS: dict[tuple[str, ...], str] = {
    ("fuse", "bake", "apply", "merge_lora", "merge-lora"): "merge",
    ("info", "show", "ls", "list", "stat", "view"): "inspect",
    ("check", "lint", "doctor", "validate"): "inspect --check",
    ("lesson", "learn", "tutorial"): "demo --learn",
    ("scale", "weigh"): "rescale",
    ("svd", "shrink", "prune", "truncate"): "resize",
    ("add", "sum", "mix", "blend"): "combine",
    ("diff", "similarity"): "compare",
    ("export", "translate"): "convert",
    ("upload", "publish"): "push",
    ("sbom", "bom"): "record",
    ("dequantize", "dequantise"): "merge --dequantize",
}
DEVICES = {"--cpu": "cpu", "--cuda": "cuda", "--gpu": "cuda"}  # options that have no value elsewhere
OPERANDS = ("--adapter", "--adapters", "--lora", "--lora-path", "--peft-model")  # of commands that take them as words
NEAR = 0.7  # the least likeness of names, without their hyphens


def meant_by(name: str, command: click.Command) -> str:
    """The option of a command that an unknown one was probably meant to be; empty where there is none."""
    options = [each for each in command.params if isinstance(each, click.Option)]
    flags = [f for each in options for f in (*each.opts, *each.secondary_opts) if f.startswith("--")]
    if is_operand(name, command):
        return ""
    return next((flag for flag in candidates(name, flags) if flag in flags), "")


def is_operand(name: str, command: click.Command) -> bool:
    """Whether an option stands for an adapter, which this command takes as an argument."""
    arguments = (str(each.name) for each in command.params if isinstance(each, click.Argument))
    return name in OPERANDS and any(each.startswith("adapter") for each in arguments)


def candidates(name: str, flags: Sequence[str]) -> Iterator[str]:
    """What may be meant, the likeliest first: another way to spell hyphens, another tool's word, the beginning, a near name."""
    from difflib import get_close_matches

    word = name.lstrip("-").replace("_", "-").lower()
    yield f"--{word}"
    for words, options in KNOWN_AS.items():
        if word in words:
            yield from options
    if len(word) > 1:
        yield from (flag for flag in flags if flag.startswith(f"--{word}"))
        yield from (f"--{near}" for near in get_close_matches(word, [flag[2:] for flag in flags], 1, NEAR))


def corrected(name: str, command: click.Command, arguments: Sequence[str]) -> list[str]:
    """The words of the command as it was meant, which may have several such options; empty where that is not known."""
    at = next((at for at, word in enumerate(arguments) if word.partition("=")[0] == name), None)
    if at is None:
        return []
    _, equals, value = arguments[at].partition("=")
    if meant := meant_by(name, command):
        device = [DEVICES[name]] if meant == "--device" and name in DEVICES else []
        new = [f"{meant}={value}"] if equals else [meant, *device]
    elif is_operand(name, command):
        new = [value] if equals else []
    else:
        return []
    return [*arguments[:at], *new, *arguments[at + 1 :]]


def sentence(name: str, command: click.Command) -> str:
    """What is said of an option that a command does not have."""
    meant = meant_by(name, command)
    more = f"; did you mean {meant!r}?" if meant else "; pass the adapter alone" * is_operand(name, command)
    return f"No such option {name!r}{more}"
