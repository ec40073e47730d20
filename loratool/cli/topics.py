"""What `loratool help TOPIC` prints: short texts of at most 80 columns, with commands that work as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import click

OPERANDS = """\
BASE is a model, ADAPTER is what training saved. Each is one of
  ./folder                       as transformers, diffusers or PEFT save it
  ./file.safetensors, ./m.gguf   one file
  org/name[@revision][:folder]   a repository on the Hub; also hf://org/name
  s3://bucket/prefix             in an object store (docs/object-stores.md)
  auto                           for BASE: the one that the adapter names

A local path takes precedence. `~` and patterns such as adapters/* are expanded.
Swapped operands, a folder too high or too low, a run folder with one
checkpoint and a file instead of its folder are recognised, and a note says what
was read. If an operand is ambiguous, the error ends with the likeliest command.

  loratool merge ./base ./my-adapter -o ./merged
  loratool merge me/my-adapter -o ./merged
  loratool inspect ./adapters/*"""

DIALECTS = """\
A dialect is how a tool names an adapter's tensors and records its strength.
Every command reads all of them; `inspect` shows which one a file uses.

`convert` writes another one, reads it back and compares the update of every
layer. It writes:{dialects}

  loratool inspect ./style.safetensors
  loratool convert ./style.safetensors -o ./for-diffusers --to diffusers"""

QUANTISED = """\
A base may be stored in bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8, MXFP4,
NVFP4, HQQ, torchao, quanto or GGUF. By default the weights that an adapter
changes become plain, and everything else is copied bit for bit.

  --dequantize    write every weight plain
  --requantize    put changed weights back into the base's format; the report
                  says how much of the update is left; too little is refused
  --accept-loss   write it anyway

  loratool inspect ./base-4bit
  loratool merge ./base-4bit ./my-adapter -o ./merged --dry-run"""

MEMORY = """\
A merge reads and writes a few rows at a time, so its memory does not grow with
the model. It is about the number of workers times a block of rows, and what
torch itself takes. `--dry-run` shows how much that is.

  --max-memory SIZE   5GB, 400MB or 5GiB; fewer workers and smaller blocks
  --workers N         threads
  --stream            to the Hub: two files on this disk at a time

  loratool merge ./base ./my-adapter -o ./merged --dry-run --max-memory 1GB"""

ROUNDING = """\
Every merged weight is exactly W + s·BA, rounded once to the output's dtype. In
16 bits a small update may be lost in that rounding. The report's gain is the
part that is left: 1 is all of it.

  --dtype keep           the base's own dtype, which is the default
  --dtype float32        loses nothing, at twice the size
  --rounding compensated corrects what rounding loses
  --rounding stochastic  up or down at random, right on average

  loratool merge ./base ./my-adapter -o ./merged --dry-run
  loratool merge ./base ./my-adapter -o ./merged --rounding compensated"""

EXIT_CODES = """\
  0    done
  1    a bug in loratool; -v shows the traceback
  2    wrong usage, or OUT exists and may not be replaced
  3    an input is malformed or not supported
  4    the adapter does not fit the base, or more would be lost than allowed
  5    verification failed
  6    a disk or file-system error
  7    the Hub or a store refused, or is unreachable
  130  interrupted; 143 terminated; 141 the reader closed the output

Errors go to stderr, all problems of an input at once, and end with the command
to type next.

  loratool verify ./merged"""

HUB = """\
An operand may be a repository: org/name, org/name@revision or
org/name:folder. `inspect` and `estimate` download headers only, `merge` the
files that it needs, into the cache that other tools use too.

  hf auth login        for gated and private repositories, and for uploads
  HF_HUB_OFFLINE=1     only what the cache holds
  HF_HOME=FOLDER       where the cache is

  loratool inspect meta-llama/Llama-3.2-1B
  loratool merge me/my-adapter -o ./merged
  loratool push ./merged me/merged --dry-run"""

JSON = """\
With --json a command prints one object on stdout and everything else on stderr.
It begins with "schema": 1; fields may be added, and are never renamed. An error
is an object too: "error" with its code, exit_code, message, problems and hint.

  loratool inspect ./my-adapter --json
  loratool --json-schema inspect

prints the JSON Schema of what `inspect --json` prints; every command has one."""

SERVERS = """\
Servers support less than adapters can express. `convert --for` chooses the
dialect and bakes in what a server does not support: the scale, several ranks,
DoRA. It knows:{servers}

Or merge: a merged model is a plain model, which every server loads and which
is as fast as its base.

  loratool convert ./my-adapter -o ./to-serve --for vllm
  loratool merge ./base ./my-adapter -o ./merged"""

LEARNING = """\
LoRA trains W' = W + (alpha/r)·B·A, with B (out, r) and A (r, in) instead of W.

  loratool demo                         makes and merges a base and an adapter
  loratool demo ./lesson --learn        six steps on files, explained
  loratool estimate ./base --rank 8 --target q_proj,v_proj
                                        parameters and memory before training
  loratool inspect ./my-adapter --values
                                        how much rank an adapter really uses
  loratool rescale ./my-adapter -o ./weaker --scale 0.5
  loratool merge ./merged ./my-adapter -w -1 -o ./base-again
                                        undoes a merge

The page docs/what-lora-is.md has the mathematics, and a layer to try."""


def known_dialects() -> str:
    from loratool.adapters.formats import DIALECTS as WRITTEN

    return DIALECTS.format(dialects=listed(WRITTEN))


def known_servers() -> str:
    from loratool.reworking.converting.servers import SERVERS as KNOWN

    return SERVERS.format(servers=listed(KNOWN))


def listed(words: Mapping[str, object]) -> str:
    """Words on lines of their own, wrapped."""
    return "\n" + click.wrap_text(", ".join(words), 78, "  ", "  ", preserve_paragraphs=False)


# Name → what it is about, for the list of topics, and its text or what makes that.
TOPICS: Mapping[str, tuple[str, str | Callable[[], str]]] = {
    "operands": ("what BASE and ADAPTER can be", OPERANDS),
    "dialects": ("adapters of other tools: reading and writing them", known_dialects),
    "quantised": ("bases in 4 or 8 bits", QUANTISED),
    "memory": ("how much a merge needs, and how to limit it", MEMORY),
    "rounding": ("small updates in 16-bit models", ROUNDING),
    "exit-codes": ("for scripts", EXIT_CODES),
    "hub": ("repositories, tokens and the cache", HUB),
    "json": ("results for programs", JSON),
    "servers": ("what vLLM, SGLang and others accept", known_servers),
    "learning": ("what LoRA is, shown on files", LEARNING),
}


def list_of_topics() -> str:
    """The topics, each with what it is about."""
    lines = [f"  {topic:<12}{about}" for topic, (about, _) in TOPICS.items()]
    return "\n".join(["loratool help TOPIC, where TOPIC is a command or one of", *lines])


def text_of(topic: str) -> str:
    """The text of a topic."""
    _, text = TOPICS[topic]
    return text if isinstance(text, str) else text()
