"""Model cards: README.md from what `loratool.json` says of how a model or an adapter was made.

The same provenance gives the same card. Foreign text reaches it escaped, and front matter only as quoted scalars.
The Hub's client has cards, too. It reads them by a YAML parser that anchors can keep busy, and what it writes changes
with the parser's release; a card is to be the same bytes wherever it is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import escaped, printable
from loratool.files.folders import CARD
from loratool.files.hub_cache import is_hub_id
from loratool.files.hub_names import with_owner
from loratool.files.untrusted import LARGEST_RECORD, open_regular, read_json
from loratool.provenance.recorded import ancestors_of

MARK = "<!-- made by loratool from loratool.json; without this line it counts as written by hand -->"
LARGEST_CARD = 1 << 20  # bytes of an input's card that are looked at
# What cards inherit, and what its values look like: words of the Hub, and a link that is an address or a file beside.
TERMS = {
    "license": re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII),
    "license_name": re.compile(r"[A-Za-z0-9][\w .+()-]{0,99}", re.ASCII),
    "license_link": re.compile(
        r"(?:https?://[\w.-]+(?::\d+)?(?:/[\w.~%/@?=&#+-]*)?|(?!.*\.\.)(?:\./)?\w[\w./-]*)", re.ASCII
    ),
    "pipeline_tag": re.compile(r"[a-z][a-z0-9-]{0,63}", re.ASCII),
}
TEMPLATE = b"# Model Card for Model ID"
PLAIN_KEY = re.compile(r"[a-z][a-z_]{0,40}")  # of a measure that this release does not know
CLASS = re.compile(r"[A-Za-z_]\w{0,100}", re.ASCII)
HERE = '"."  # this folder, or the repository\'s id'  # in a snippet, until it is known where it goes
DONE = {
    "merge": "{base} with {adapters} merged into its weights.",
    "dequantise": "A dequantised copy of {base}.",
    "rescale": "A rescaled copy of {adapter}.",
    "combine": "A combination of {adapters}.",
    "resize": "A copy of {adapter} with different ranks.",
    "convert": "A copy of {adapter} in another dialect.",
    "extract": "An adapter extracted from a fine-tuned model.",
    "expand": "An adapter expanded from {shared}, where it was compressed together with others.",
    "rebase": "A copy of {adapter}, rebased onto {onto}.",
}
MEASURED = {
    "norm": "‖ΔW‖ (Frobenius)",
    "predicted": "relative error from truncation",
    "achieved": "relative error as stored",
    "truncated": "relative error of truncation",
    "stored": "relative error of rounding",
    "error": "relative error as stored",
    "parameters_before": "parameters, before",
    "parameters": "parameters",
    "bytes_before": "bytes of factors, before",
    "bytes": "bytes of factors",
    "norm_ratio": "norm of the result / norm of the weighted update",
    "all": "in total",
    "worst_error": "‖ΔW − ΔW'‖ / ‖ΔW‖ of the worst layer",
    "energy_kept": "fraction of ‖ΔW‖² kept",
}


@dataclass(frozen=True)
class Subject:
    """An adapter that a card is about, as the format that it is in tells it."""

    title: str
    trained_with: str
    library: str  # that loads it, by its name on the Hub; empty where the Hub has none
    tags: tuple[str, ...]
    base: str  # as its config names it
    ranks: tuple[int, ...]  # all that the config names, the smallest first
    snippet: Callable[[str, str], list[str]]  # Python that loads it, from a base and a place
    prompt: str = ""  # that calls up what was trained, of an image model, where its files tell it


@dataclass(frozen=True)
class Terms:
    """What a card inherits of the cards of its inputs."""

    fields: Mapping[str, str]
    disputed: tuple[str, ...] = ()  # licences that differ, so that none is chosen


def terms_of(*folders: Path) -> Terms:
    """What the cards of these folders say of licence and task; of a task the first that is told."""
    found = [front_matter(folder / CARD) for folder in folders]
    licences = dict.fromkeys((f.get("license", ""), f.get("license_name", "")) for f in found if "license" in f)
    told = (pair for fields in reversed(found) for pair in fields.items())  # so that the first one stands
    merged = {key: value for key, value in told if len(licences) <= 1 or key == "pipeline_tag"}
    return Terms(merged, tuple(name or licence for licence, name in licences) if len(licences) > 1 else ())


def front_matter(card: Path) -> dict[str, str]:
    """The plain entries of a card's front matter that others inherit."""
    text = content_of(card).decode("utf-8", "replace")
    match = re.match(r"﻿?---[ \t]*\r?\n(.*?)\n---", text, re.DOTALL)
    found: dict[str, str] = {}
    for line in (match[1] if match else "").splitlines():
        key, colon, value = line.partition(":")
        value = value.split(" #")[0].strip().strip("'\"")
        if colon and key in TERMS and TERMS[key].fullmatch(value):
            found[key] = value
    return found


def card(provenance: Mapping[str, Any], about: Subject | Mapping[str, Any], terms: Terms, place: str = ".") -> bytes:
    """README.md of a result. `about` is an adapter or a model's config.json, `place` what it is loaded from."""
    verb = str(provenance.get("made_by", "")).removeprefix("loratool ")
    adapters = [a for a in (provenance.get("adapters") or [provenance.get("adapter")]) if isinstance(a, Mapping)]
    verb = "dequantise" if verb == "merge" and not adapters else verb
    models = models_in(provenance)
    plain_model = not verb and not isinstance(about, Subject)
    base = "" if plain_model else base_id(provenance, about)  # what a config calls itself is no base
    title = about.title if isinstance(about, Subject) else "Model" if plain_model else "Merged model"
    trained = f"This adapter was trained with {about.trained_with}." if isinstance(about, Subject) else ""
    parts = [
        "---",
        *front(verb, base, adapters, about, terms),
        "---",
        "",
        f"# {title}",
        "",
        MARK,
        "",
        DONE.get(verb, trained or "No description provided.").format(
            base=named(found) if isinstance(found := provenance.get("base"), Mapping) else "A base model",
            adapters=f"the adapter {named(adapters[0])}" if len(adapters) == 1 else f"{len(adapters)} adapters",
            adapter=named(adapters[0]) if adapters else "an adapter",
            shared=named(models["shared"]) if "shared" in models else "a folder",
            onto=named(models["onto"]) if "onto" in models else "another base",
        ),
        *section("Inputs", lineage(provenance, models, adapters, base)),
        *section("How it was made", how(provenance)),
        *section("Measurements", measured(provenance, about)),
        *section("Usage", snippet(about, base, place)),
        *section("Licence", licence(terms)),
    ]
    return ("\n".join(parts) + "\n").encode()


def section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def base_id(provenance: Mapping[str, Any], about: Subject | Mapping[str, Any]) -> str:
    """The base's id on the Hub; empty where none is known."""
    base = provenance.get("base")
    told = [
        str(base.get("hub", "")).split("@")[0] if isinstance(base, Mapping) else "",
        str(base.get("id", "")) if isinstance(base, Mapping) else "",
        about.base if isinstance(about, Subject) else str(about.get("_name_or_path") or ""),
    ]
    return next((name for name in map(with_owner, told) if is_hub_id(name)), "")


def front(
    verb: str,
    base: str,
    adapters: Sequence[Mapping[str, Any]],
    about: Subject | Mapping[str, Any],
    terms: Terms,
) -> Iterator[str]:
    """The lines of the front matter: YAML whose scalars are all JSON."""
    fields: dict[str, Any] = {}
    several = verb == "merge" and len(adapters) > 1
    if base:
        parts = [str(adapter.get("hub", "")).split("@")[0] for adapter in adapters] if several else []
        fields["base_model"] = list(dict.fromkeys([base, *filter(is_hub_id, parts)]))
        if verb != "dequantise":
            fields["base_model_relation"] = "adapter" if verb != "merge" else "merge" if several else "finetune"
    if isinstance(about, Subject):
        tags = about.tags
        if about.library:
            fields["library_name"] = about.library
        if about.prompt:
            fields |= {"instance_prompt": about.prompt, "widget": [{"text": about.prompt}]}
    else:
        tags = ("lora", "merge") if verb == "merge" else ()
        if about.get("model_type") or about.get("architectures"):
            fields["library_name"] = "transformers"
        elif "_diffusers_version" in about or "_class_name" in about:
            fields["library_name"] = "diffusers"
    fields |= terms.fields
    fields["tags"] = ["loratool", *tags]
    for key, value in sorted(fields.items()):
        if isinstance(value, list):
            yield f"{key}:"
            yield from (f"- {entry(item)}" for item in value)
        else:
            yield f"{key}: {quoted(value)}"


def entry(item: str | Mapping[str, str]) -> str:
    """An item of a list: a scalar, or a mapping of one key."""
    return (
        ", ".join(f"{key}: {quoted(value)}" for key, value in item.items())
        if isinstance(item, Mapping)
        else quoted(item)
    )


def quoted(value: str) -> str:
    return json.dumps(printable(value), ensure_ascii=False)


def models_in(provenance: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The inputs that are no adapters, by what they were to the command."""
    return {role: entry for role, entry in ancestors_of(provenance) if role != "adapter"}


def lineage(
    provenance: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Any]],
    adapters: Sequence[Mapping[str, Any]],
    base: str,
) -> list[str]:
    """A table of all inputs with their commits and checksums."""
    rows = [f"| {label(role)} | {named(entry)} | | | |" for role, entry in models.items()]
    if not rows and base:
        rows.append(f"| base | {cell(base)} | | | |")
    weights = provenance.get("weights")
    for number, entry in enumerate(adapters):
        weight = entry.get("weight", weights[number] if isinstance(weights, list) and number < len(weights) else "")
        digests = entry.get("sha256")
        sha256 = next(iter(digests.values()), "") if isinstance(digests, Mapping) else ""
        shown = f"{weight:g}" if isinstance(weight, float) else figure(weight)
        rows.append(
            f"| adapter | {named(entry)} | {shown} | {cell(entry.get('rank', ''))} | {cell(str(sha256)[:16])} |"
        )
    return ["| | name | weight | rank | SHA-256 (first 16) |", "|---|---|---|---|---|", *rows] if rows else []


def named(entry: Mapping[str, Any]) -> str:
    return cell(entry.get("hub") or entry.get("name") or "?")


def cell(text: object) -> str:
    """Text as a table's cell: nothing in it is markup."""
    safe = printable(text).replace("`", "'").replace("|", "¦")
    return f"`{safe}`" if safe else ""


def label(key: str) -> str:
    """The name of a number as a table's cell: in words where it is one of ours, else as code."""
    return MEASURED.get(key) or (key.replace("_", " ") if PLAIN_KEY.fullmatch(key) else cell(key))


def how(provenance: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if isinstance(words := provenance.get("command"), str):
        one_line = escaped(words).replace("```", "'''")
        lines += ["```console", f"$ {one_line}", "```", ""]
    versions = provenance.get("versions")
    rows = [(str(k), v) for k, v in versions.items()] if isinstance(versions, Mapping) else []
    settings = {
        key: provenance[key]
        for key in ("method", "rule", "rank", "density", "seed", "dtype")
        if provenance.get(key) not in (None, "keep")
    }
    lines += [f"- {cell(key)}: {cell(value)}" for key, value in (*settings.items(), *rows)]
    return lines


def measured(provenance: Mapping[str, Any], about: Subject | Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, object]] = []  # cells
    if isinstance(tensors := provenance.get("tensors"), Mapping):
        rows += [(f"tensors {label(str(key))}", value) for key, value in tensors.items()]
    if isinstance(about, Subject) and (ranks := about.ranks):
        rows.append(("rank", ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"))
    table = provenance.get("measured")
    for key, value in table.items() if isinstance(table, Mapping) else ():
        if isinstance(value, Mapping):
            rows += [(f"{label(key)}: {cell(name)}", number) for name, number in value.items()]
        else:
            rows.append((label(key), value))
    shown = [(key, figure(value)) for key, value in rows if value is not None]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown)] if shown else []


def figure(value: object) -> str:
    """A number as a table's cell; anything else as code."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if type(value) is int and abs(value) < 10**18 else cell(value)


def snippet(about: Subject | Mapping[str, Any], base: str, place: str) -> list[str]:
    """Python that loads the result, from the folder it is in or from its repository; empty where none is known to."""
    where = json.dumps(printable(place)) if place != "." else HERE
    lines = about.snippet(base or "BASE", where) if isinstance(about, Subject) else model_snippet(about, where)
    return ["```python", *lines, "```"] if lines else []


def model_snippet(config: Mapping[str, Any], where: str) -> list[str]:
    """Python that loads a model from a place; empty where its config does not tell the class."""
    if not (config.get("model_type") or config.get("architectures")):
        return []  # weights alone
    classes, own = config.get("architectures"), config.get("auto_map")
    name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else "AutoModel"
    name = name if CLASS.fullmatch(name) else "AutoModel"
    name = "AutoModelForCausalLM" if name.endswith(("ForCausalLM", "LMHeadModel")) else name
    trust = ""
    if isinstance(own, Mapping):  # code of the model's own: its classes are not in transformers
        named = [key for key in own if isinstance(key, str) and re.fullmatch(r"AutoModel\w*", key, re.ASCII)]
        name = name if name in named or not named else named[-1]
        trust = ", trust_remote_code=True" if named else ""
    return [
        f"from transformers import {name}",
        "",
        f"place = {where}",
        f"model = {name}.from_pretrained(place{trust})",
    ]


def licence(terms: Terms) -> list[str]:
    if terms.disputed:
        listed = ", ".join(map(cell, terms.disputed))
        return [f"The inputs have different licences ({listed}); the publisher must decide which of them apply."]
    if "license" in terms.fields:
        return [f"{cell(terms.fields.get('license_name') or terms.fields['license'])}, as stated by the inputs."]
    return []


def is_nobodys(path: Path | None) -> bool:
    """Whether nobody has written a card or taken it for their own: one made here for another result, or a template."""
    return path is not None and (MARK.encode() in (text := content_of(path)) or TEMPLATE in text)


def addressed(path: Path, place: str) -> bytes | None:
    """A card of ours whose code loads from `place` in place of its own folder; None for any other."""
    text, here = content_of(path), f"place = {HERE}\n".encode()
    if MARK.encode() not in text or text.count(here) != 1 or len(text) == LARGEST_CARD:
        return None
    return text.replace(here, f"place = {json.dumps(printable(place))}\n".encode())


def is_template(path: Path) -> bool:
    """Whether it is what PEFT and transformers put where a card belongs."""
    return TEMPLATE in content_of(path)


def content_of(path: Path) -> bytes:
    """The text of a card, as far as it is looked at; empty where there is none."""
    if not path.exists():
        return b""
    with open(open_regular(path), "rb") as stream:
        return stream.read(LARGEST_CARD)


def card_of(folder: Path, place: str, adapter: Subject | None = None) -> bytes:
    """The card of a finished model or `adapter`, from the files in its folder alone, of which none must be there.

    Raises `InputError` where one of them is malformed.
    """

    def table(name: str) -> dict[str, Any]:
        path = folder / name
        return read_json(path, LARGEST_RECORD, repeated=True, lenient=True) if path.exists() else {}

    return card(table("loratool.json"), adapter or table("config.json"), terms_of(folder), place)
