"""Secrets in files that are about to be shown to others: where one is, and of what kind. Its value is never told.

Only the whole shape of a known kind counts, with its length and alphabet: a vocabulary that has `hf_` as a token, and
prose about keys, hold none. Scanners such as detect-secrets look at lines of source code, take high entropy for a
secret, which all weights and vocabularies have, and hold a whole file in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

OVERLAP = 8192  # bytes of a part of a file that are looked at with the next one; no shape is longer
HOST = rb"[A-Za-z0-9.\[\]-]{1,255}"
# From the end of a PEM block's first line to its content: line ends, also as JSON or a notebook spells them.
NEXT_LINE = rb"(?:[ \t\"',+>#]|\r?\n|\\+[rn]){1,80}"
PEM_FIELDS = rb"(?:[A-Za-z-]{3,24}: [^\r\n\\]{1,120}" + NEXT_LINE + rb"){0,6}"
PLACEHOLDER = rb"(?i:pass(?:word|wd)?|pwd|token|secret|(?:api|access)?[_-]?key|your[\w-]*|x+|\.+|[$*%])"


@dataclass(frozen=True)
class Kind:
    """A kind of secret.

    `anchors` are the words that one begins with, and `rest` is all that follows them. `before` are characters that do
    not stand before one, being a part of a longer word.
    """

    title: str
    anchors: tuple[bytes, ...]
    rest: re.Pattern[bytes]
    before: re.Pattern[bytes] | None

    @classmethod
    def of(cls, title: str, anchors: str, rest: bytes, before: bytes = rb"[A-Za-z0-9_]") -> Kind:
        """`anchors` as words with blanks between them."""
        words = tuple(word.encode() for word in anchors.split())
        return cls(title, words, re.compile(rest), re.compile(before) if before else None)


def exactly(characters: bytes, count: str) -> bytes:
    """So many of some characters, and none after them."""
    return b"[%b]{%b}(?![%b])" % (characters, count.encode(), characters)


ALNUM, HEX, WEB = rb"A-Za-z0-9", rb"0-9a-f", rb"A-Za-z0-9_-"
KINDS = (
    Kind.of("an access token of Hugging Face", "hf_ api_org_", exactly(ALNUM, "34")),
    Kind.of("an OAuth token of Hugging Face", "hf_oauth_ hf_jwt_", rb"[\w-]{8,2000}\.[\w-]{8,2000}\.[\w-]{2,1000}"),
    Kind.of("an API key of OpenAI", "sk-", rb"(?:(?:proj|svcacct|admin|None)-)?[\w-]{20,200}T3BlbkFJ[\w-]{20,200}"),
    Kind.of("an API key", "sk-", b"(?:%b|%b)" % (exactly(ALNUM, "48"), exactly(HEX, "32"))),
    Kind.of("an API key of Anthropic", "sk-ant-", rb"[a-z]{2,12}\d{2}-[\w-]{80,120}"),
    Kind.of("an API key of OpenRouter", "sk-or-v1-", exactly(HEX, "64")),
    Kind.of("a key of Stripe", "sk_live_ rk_live_", exactly(ALNUM, "24,100")),
    Kind.of("a token of GitHub", "ghp_ gho_ ghu_ ghs_ ghr_", exactly(ALNUM, "36")),
    Kind.of("a token of GitHub", "github_pat_", rb"[A-Za-z0-9]{22}_" + exactly(ALNUM, "59")),
    Kind.of("a token of GitLab", "glpat- gldt- glrt-", exactly(WEB, "20,64")),
    Kind.of("an access key of AWS", "AKIA ASIA", exactly(rb"A-Z0-9", "16")),
    Kind.of(
        "a secret key of AWS",
        "aws_secret_access_key AWS_SECRET_ACCESS_KEY",
        rb"[\\\"']{0,3}\s{0,3}[:=]\s{0,3}[\\\"']{0,3}" + exactly(rb"A-Za-z0-9/+=", "40"),
    ),
    Kind.of("an API key of Google", "AIza", exactly(WEB, "35")),
    Kind.of("a client secret of Google", "GOCSPX-", exactly(WEB, "28")),
    Kind.of("a token of Slack", "xoxb- xoxp- xoxa- xoxr- xoxs-", rb"(?:\d{9,14}-){1,3}[A-Za-z0-9]{20,64}"),
    Kind.of(
        "an API key of Weights & Biases",
        "WANDB_API_KEY wandb_api_key",
        rb"[\\\"']{0,3}\s{0,3}[:=]\s{0,3}[\\\"']{0,3}" + exactly(HEX, "40"),
    ),
    Kind.of("a token of PyPI", "pypi-AgEIcHlwaS5vcmc pypi-AgENdGVzdC5weXBpLm9yZ", rb"[\w-]{50,1000}"),
    Kind.of("a token of npm", "npm_", exactly(ALNUM, "36")),
    Kind.of("an API key of Replicate", "r8_", exactly(ALNUM, "37")),
    Kind.of("an API key of Groq", "gsk_", exactly(ALNUM, "52")),
    Kind.of("an API key of xAI", "xai-", exactly(ALNUM, "80")),
    Kind.of("an API key of NVIDIA", "nvapi-", exactly(WEB, "64")),
    Kind.of("a token of Databricks", "dapi", exactly(HEX, "32")),
    Kind.of("a JSON web token", "eyJ", rb"[\w-]{10,1500}\.eyJ[\w-]{10,1500}\.[\w-]{20,1000}"),
    Kind.of(
        "a private key",
        "-----BEGIN",
        rb" (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----" + NEXT_LINE + PEM_FIELDS + rb"[A-Za-z0-9+/=]{24}",
        b"",
    ),
    Kind.of(
        "credentials in an address",
        r"://  :\/\/",
        rb"[\w.~%%!&+,;=-]{1,128}:(?!%b@)(?![$*%%{<])[\w.~%%!$&*+,;=^-]{3,512}@%b" % (PLACEHOLDER, HOST),
        b"",
    ),
    Kind.of("a signed address", "X-Amz-Signature=", exactly(HEX, "64")),
)


def secrets_in(parts: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """(line, kind) of each secret in a file whose bytes come in parts, of which two are in memory at a time.

    NULs are passed over, so that text in UTF-16 is read as well.
    """
    line, text, done = 1, b"", 0  # all that begins before `done` has been told
    for part in chain(parts, (None,)):
        text += (part or b"").replace(b"\0", b"")
        cut = len(text) if part is None else max(done, len(text) - OVERLAP)
        for start, _, title in matches_in(text):
            if done <= start < cut:
                yield line + text.count(b"\n", 0, start), title
        dropped = max(0, cut - 1)  # what stands before an anchor counts, too
        line += text.count(b"\n", 0, dropped)
        text, done = text[dropped:], cut - dropped


def matches_in(text: bytes) -> Iterator[tuple[int, int, str]]:
    """(start, stop, kind) of each secret in a text, the anchors being found first: most texts have few of them."""
    for kind in KINDS:
        for anchor in kind.anchors:
            start = text.find(anchor)
            while start >= 0:
                inside_word = kind.before and start and kind.before.match(text, start - 1)
                if not inside_word and (rest := kind.rest.match(text, start + len(anchor))):
                    yield start, rest.end(), kind.title
                start = text.find(anchor, start + len(anchor))


def without_secrets(text: str) -> str:
    """`text` with the name of its kind in place of each secret."""
    raw = text.encode(errors="surrogateescape")
    for start, stop, title in sorted(matches_in(raw), reverse=True):
        raw = raw[:start] + f"<{title}>".encode() + raw[stop:]
    return raw.decode(errors="surrogateescape")
