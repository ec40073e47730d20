"""What training tools write into the headers of files, short enough to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized

from loratool.errors import escaped
from loratool.files.untrusted import LARGEST_CONFIG, json_value

LONGEST = 160  # characters of a value that is shown whole
LONGEST_PART = 40  # of one within another
MOST_ENTRIES = 6  # of a list or a table


def shortened_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Every entry, long texts cut, and of long lists and tables the first entries. Nothing is left out or hidden."""
    return {cut(escaped(key), LONGEST): shortened(value) for key, value in metadata.items()}


def shortened(text: str) -> str:
    if len(text) <= LONGEST:
        return escaped(text)
    if text[0] in "[{" and len(text) <= LARGEST_CONFIG:
        try:
            return cut(
                ", ".join(entries(json_value(text.encode("utf-8", "surrogatepass"), repeated=True, lenient=True))),
                2 * LONGEST,
            )
        except ValueError:
            pass
    return f"{escaped(text[:LONGEST])}… ({len(text):,} characters)"


def entries(value: object) -> Iterator[str]:
    """The first entries of a list or a table, and how many more there are."""
    pairs = (
        [*value.items()]
        if isinstance(value, dict)
        else [("", each) for each in value]
        if isinstance(value, list)
        else []
    )
    for key, each in pairs[:MOST_ENTRIES]:
        yield f"{cut(escaped(key), LONGEST_PART)}: {brief(each)}" if key else brief(each)
    if len(pairs) > MOST_ENTRIES:
        yield f"… and {len(pairs) - MOST_ENTRIES:,} more"


def brief(value: object) -> str:
    match value:
        case dict():
            return f"{{{number_of(value)}}}" if value else "{}"
        case list():
            return f"[{number_of(value)}]" if value else "[]"
    return cut(escaped(str(value)), LONGEST_PART)


def number_of(value: Sized) -> str:
    return f"{len(value):,} {'entry' if len(value) == 1 else 'entries'}"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}…"
