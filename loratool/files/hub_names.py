"""The words that name a place on the Hub: `org/name[@revision][:subfolder]` and `hf://org/name[@revision][/subfolder]`.

The Hub's client reads the second form alone, since a release that is newer than what is required here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import PurePath

from loratool.arguments import PathLike
from loratool.errors import UsageError, printable

ID = r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)"
SHORT = rf"{ID}(?:@(?P<revision>[^:@]+))?(?::(?P<inside>.+))?"
URL = rf"{ID}(?:@(?P<revision>refs/(?:pr|convert)/[^/:]+|[^/:@]+))?(?:[/:](?P<inside>.*))?"
PAGE = rf"https?:/{{1,2}}(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/){ID}"
# a name that Git takes, which becomes the name of a file in the Hub's cache
REVISION = r"(?!.*\.\.|.*//|.*/\.|[./-])[^\x00-\x20\x7f~^:?*\[\\]{1,200}(?<![./])"
ONE_SLASH = re.compile(r"^(s3:|hf:)/(?!/)")
SCHEME = re.compile(r"hf:/{1,2}")  # a Path has lost one of its slashes
# Models that had no owner until 2024, and that configs still call so: the owner that each has now → the names.
OWNERS = {
    "openai-community": r"gpt2(-medium|-large|-xl)?|openai-gpt|roberta-(base|large)-openai-detector",
    "google-bert": r"bert-(base|large)-(un)?cased(-whole-word-masking)?(-finetuned-(squad|mrpc))?"
    r"|bert-base-multilingual-(un)?cased|bert-base-chinese|bert-base-german-cased|bert-base-german-dbmdz-(un)?cased",
    "distilbert": r"distilbert-base-(un)?cased(-distilled-squad)?|distilbert-base-uncased-finetuned-sst-2-english"
    r"|distilbert-base-(german|multilingual)-cased|distilgpt2|distilroberta-base",
    "FacebookAI": r"roberta-(base|large)|roberta-large-mnli|xlm-roberta-(base|large)(-finetuned-conll0[23]-[a-z]+)?"
    r"|xlm-(mlm|clm)-[a-z0-9-]+",
    "google-t5": r"t5-(small|base|large|3b|11b)",
    "albert": r"albert-(base|large|xlarge|xxlarge)-v[12]",
    "xlnet": r"xlnet-(base|large)-cased",
    "almanach": r"camembert-base",
    "Salesforce": r"ctrl",
    "transfo-xl": r"transfo-xl-wt103",
}


@dataclass(frozen=True)
class HubPath:
    """A repository of the Hub, or a folder or file in it."""

    repo: str
    revision: str | None = None
    inside: str = ""  # a plain relative path

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return self.repo + at + (f":{self.inside}" if self.inside else "")


def with_owner(name: str) -> str:
    """The name of a repository with its owner, where it is one of those that had none; any other as it is."""
    if "/" in name:
        return name
    owner = next((owner for owner, names in OWNERS.items() if re.fullmatch(names, name)), "")
    return f"{owner}/{name}" if owner else name


def slashed(operand: PathLike) -> str:
    """The text of an operand; a `Path` may hold the slashes of a name turned round, and has one of `s3://` or `hf://`."""
    text = operand.as_posix() if isinstance(operand, PurePath) else os.fspath(operand)
    return ONE_SLASH.sub(r"\1//", text)


def way_inside(folder: str, name: str) -> str:
    """How to name one of several things in a folder, as it is shown."""
    return f", such as {folder}/{name}" if folder.startswith("s3://") else " after a colon"


def parse(operand: PathLike) -> HubPath | None:
    """The place on the Hub that a word names; None for a word that can only be a path.

    Raises `UsageError` for an `hf://` address of something else than a model, and for a subfolder that leads out.
    """
    text = slashed(operand)
    scheme = SCHEME.match(text)
    if scheme:
        text = text[scheme.end() :].removeprefix("models/")
        match = re.fullmatch(URL, text)
        if match is None or text.startswith(("datasets/", "spaces/")):
            raise UsageError(
                f"{printable(operand)}: not a valid model address; expected hf://org/name@revision/subfolder"
            )
    else:
        match = re.fullmatch(SHORT, text)
        if match is None or (text.endswith(".safetensors") and ":" not in text):
            return None
    inside = (match["inside"] or "").strip("/")
    if inside and {"", ".", ".."} & set(inside.split("/")):
        raise UsageError(f"{printable(operand)}: {printable(inside)} is not a plain path inside a repository")
    revision = match["revision"]
    if revision and scheme:
        revision = revision.replace("%2F", "/")
    if revision and not re.fullmatch(REVISION, revision):
        raise UsageError(f"{printable(operand)}: {printable(revision)} is not a branch, tag or commit")
    return HubPath(match["repo"], revision, inside)
