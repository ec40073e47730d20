"""What comes from files is text wherever it is shown: in terminals, Markdown, HTML and YAML.

Names of folders, files and tensors, values of configs, cards of inputs and foreign provenance are hostile here; what is
written is read back by parsers of others: Unicode's categories, markdown-it, PyYAML, Python's HTML parser.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from loratool import cli
from loratool.adapters.formats import subject_at
from loratool.errors import InputError, escaped, printable
from loratool.inspecting.health import Finding
from loratool.notes import Note
from loratool.provenance.cards import card_of

PAYLOADS = {
    "script": "<script>forged()</script><img src=x onerror=forged()>",
    "end of a script": "</script><!-- --><script>forged()//",
    "link": "[forged](javascript:forged) ![forged](http://forged)",
    "autolink": "<http://forged> http://forged www.forged.example @forged",
    "code and table": "`forged` | ``forged`` | **forged** |\\| ~~forged~~",
    "fence": "```\n\n# forged\n\n```\n~~~\n",
    "front matter": '"\n---\nforged: true\n---\n# forged\n',
    "YAML": "!!python/object:forged &a *a {forged: [1]} # forged",
    "YAML in a quote": '"\', forged: \\"x\\" \\n',
    "escapes": "\x1b[2J\x1b]0;forged\x07\x1b]8;;http://forged\x1b\\x",
    "C1": "\x9b31mforged\x9c\x85\x8d\x90",
    "lines": "a\r\nwarning: forged\n\nError: forged\x0b\x0cforged\u2028forged\u2029",
    "bidi": "\u202eforged\u202c\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
    "no width": "f\u200bo\u200cr\u200dg\u2060e\ufeffd\u00ad\u034f\u3164\u115f\u2800",
    "tags": "forged" + "".join(map(chr, (0xE0001, 0xE0041, 0xE0100, 0xE01EF, 0xF0000))),
}
BAD = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
HARMLESS = "plain_name"


def hidden(text: str) -> list[str]:
    """Characters that a terminal obeys, or that nobody sees; line ends are our own."""
    blank = "\u034f\u115f\u1160\u3164\u2800\uffa0"
    return [
        f"U+{ord(c):04X}"
        for c in text
        if c != "\n" and (unicodedata.category(c) in BAD or c in blank or 0xE0000 <= ord(c) <= 0xE0FFF)
    ]


def file_name(payload: str) -> str:
    return re.sub(r"[/\0]", "_", payload)[:60]


def write_models(home: Path, payload: str) -> None:
    """A base and two adapters of it in which everything that is a name or a text is `payload`."""
    name = file_name(payload)
    generator = torch.Generator().manual_seed(0)
    base, adapters = home / f"base{name}", [home / f"one{name}", home / f"two{name}"]
    base.mkdir()
    modules = [f"layers.{n}.{payload}" for n in (0, 1)]
    weights = {f"{module}.weight": torch.randn(8, 8, generator=generator) for module in modules}
    save_file(weights, base / "model.safetensors", metadata={payload: payload})
    config = {"model_type": payload, "architectures": [payload], "_name_or_path": payload, "id2label": {"0": payload}}
    (base / "config.json").write_text(json.dumps({**config, payload: payload}))
    (base / "generation_config.json").write_text(json.dumps({payload: payload}))
    front = "\n".join(f"{key}: {payload}" for key in ("license", "license_name", "license_link", "pipeline_tag"))
    (base / f"{name}.txt").write_text(payload)
    for folder in adapters:
        folder.mkdir()
        factors = {}
        for module in modules:
            factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
            factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(8, 2, generator=generator)
        save_file(factors, folder / "adapter_model.safetensors", metadata={payload: payload})
        settings: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [payload]}
        settings |= {"base_model_name_or_path": payload, "task_type": payload, "revision": payload}
        settings |= {"auto_mapping": {"base_model_class": payload, "parent_library": payload}, payload: payload}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / f"{name}.txt").write_text(payload)
        (folder / "README.md").write_text(f"---\n{front}\n---\n# Model Card for Model ID\n{payload}\n")


@pytest.fixture(scope="module", params=PAYLOADS)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hostile")
    write_models(home, PAYLOADS[request.param])
    return home


def commands(home: Path, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Every command on the models of a folder: (name, words)."""
    base, one, two = (str(next(home.glob(f"{name}*"))) for name in ("base", "one", "two"))
    yield "inspect", ["inspect", base, one, two, "--tensors"]
    yield "check", ["inspect", base, one, "--base", base, "--check", "--values", "--device", "cpu"]
    yield "page", ["inspect", base, one, "--check", "--html", str(out / "page.html"), "--device", "cpu"]
    yield "estimate", ["estimate", base, "--rank", "2", "--target", "x"]
    yield "plan", ["merge", base, one, two, "-o", str(out / "none"), "--dry-run"]
    yield "merge", ["merge", base, one, two, "-o", str(out / "merge"), "--device", "cpu"]
    yield "rescale", ["rescale", one, "-o", str(out / "rescale"), "--scale", "0.5"]
    yield "combine", ["combine", one, two, "-o", str(out / "combine"), "--device", "cpu"]
    yield "convert", ["convert", one, "-o", str(out / "convert"), "--to", "mlx"]
    yield "resize", ["resize", one, "-o", str(out / "resize"), "--rank", "1", "--device", "cpu"]
    yield "extract", ["extract", base, str(out / "merge"), "-o", str(out / "extract"), "--rank", "2", "--device", "cpu"]
    yield "verify", ["verify", str(out / "merge"), "--base", base, "--adapter", one, "--device", "cpu"]
    yield "verify a record", ["verify", str(out / "merge")]
    yield "compare", ["compare", one, two, "--device", "cpu"]
    yield "push", ["push", one, "alice/new", "--dry-run", "--card"]
    yield "push of a merge", ["push", str(out / "merge"), "alice/new", "--dry-run"]
    yield "no such file", ["inspect", one + "x"]
    yield "no such option", ["inspect", one, "--" + Path(one).name]
    yield "no such base", ["merge", "auto", one, "-o", str(out / "auto")]


def test_no_command_shows_or_writes_hostile_text_as_more_than_text(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Terminals get no character that they obey or hide, and no forged line; every card that was written holds the names
    as code, in valid front matter with no key of theirs; the page has the elements that it has for any other model."""
    done: dict[str, int] = {}
    for name, words in commands(hostile, tmp_path):
        code = cli.run(words)
        shown = capsys.readouterr()
        for text in (shown.out, shown.err):
            assert hidden(text) == [], (name, text)
            assert [
                line for line in text.splitlines() if re.match(r"(forged|warning: forged|Error: forged|# )", line)
            ] == []
        assert code != 1, (name, shown.err)
        done[name] = code
    must = (
        "inspect",
        "page",
        "plan",
        "merge",
        "rescale",
        "combine",
        "convert",
        "resize",
        "compare",
        "push",
        "push of a merge",
    )
    assert {name: done[name] for name in must} == dict.fromkeys(must, 0)
    cards = sorted(tmp_path.glob("*/README.md"))
    assert len(cards) >= 4
    for path in cards:
        check_card(path.read_bytes().decode())
    check_page((tmp_path / "page.html").read_text())


def check_card(text: str) -> None:
    """The card as the Hub takes it apart."""
    _, front, body = text.split("---\n", 2)
    known = {"base_model", "base_model_relation", "library_name", "license", "license_name", "license_link"}
    fields = yaml.safe_load(front)
    assert set(fields) <= {*known, "pipeline_tag", "tags"}, fields
    assert "forged" not in json.dumps(fields)
    assert hidden(text) == []
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    blocks = [t for t in tokens if t.type == "html_block"]
    assert [b.content.startswith("<!-- made by loratool") and b.content.count("<") == 1 for b in blocks] == [True]
    headings = [tokens[at + 1].content for at, t in enumerate(tokens) if t.type == "heading_open"]
    titles = {
        "Merged model",
        "LoRA adapter",
        "Model",
        "PEFT adapter",
        "Inputs",
        "How it was made",
        "Measurements",
        "Usage",
        "Licence",
    }
    assert set(headings) <= titles, headings
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "code_inline", "softbreak"}, {c.type for c in inline}
    assert not any("forged" in child.content for child in inline if child.type == "text")


class Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and the values of these."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.comments = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def elements(page: str) -> tuple[list[tuple[str, tuple[str, ...]]], int]:
    parser = Elements()
    parser.feed(page)
    assert [value for value in parser.values if "forged" in value] == []
    return parser.found, parser.comments


EXPECTED: list[Any] = []


def check_page(page: str) -> None:
    assert hidden(page) == []
    assert "<script>forged" not in page
    assert "onerror=forged" not in page.replace("&lt;img src=x onerror=forged", "")
    assert elements(page) == EXPECTED[0]


@pytest.fixture(scope="module", autouse=True)
def expected(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the page of a model with plain names consists of."""
    home = tmp_path_factory.mktemp("harmless")
    write_models(home, HARMLESS)
    words = ["inspect", str(home / f"base{HARMLESS}"), str(home / f"one{HARMLESS}"), "--check", "-q", "--device", "cpu"]
    assert cli.run([*words, "--html", str(home / "page.html")]) == 0
    EXPECTED[:] = [elements((home / "page.html").read_text())]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_card_of_foreign_provenance_holds_it_as_text(tmp_path: Path, payload: str) -> None:
    """Anybody may have written a loratool.json and a config; `push --card` makes a card of them."""
    evil = PAYLOADS[payload]
    entry = {
        "name": evil,
        "hub": evil,
        "id": evil,
        "weight": evil,
        "rank": [evil],
        "sha256": {evil: evil},
        "format": evil,
    }
    for made_by in ("loratool merge", "loratool rescale", "loratool combine", evil):
        table = {
            "made_by": made_by,
            "command": f"loratool {evil}",
            "versions": {evil: evil},
            "base": entry,
            "tuned": entry,
            "adapters": [entry, evil, None, {"weight": 10**300}],
            "weights": [evil, True],
            "dtype": evil,
            "tensors": {evil: evil, "edited": evil},
            "measured": {evil: {evil: evil}, "norm": evil, "error": {evil: 1.0}},
            **dict.fromkeys(("method", "rule", "density", "seed", "rank"), evil),
        }
        (tmp_path / "loratool.json").write_text(json.dumps(table))
        config = {
            "peft_type": evil,
            "base_model_name_or_path": evil,
            "task_type": evil,
            "r": 3,
            "rank_pattern": {evil: 4},
        }
        config |= {"architectures": [evil], "model_type": evil, "auto_map": {f"AutoModel{evil}": evil}}
        for name in ("adapter_config.json", "config.json"):
            (tmp_path / name).write_text(json.dumps(config))
            check_card(card_of(tmp_path, "alice/new", subject_at(tmp_path)).decode())
            (tmp_path / name).unlink()


LINKS = {
    "https://example.org/a/LICENSE.txt": True,
    "LICENSE": True,
    "./LICENSE.md": True,
    "javascript:alert(1)": False,
    "data:text/html,x": False,
    "//example.org/x": False,
    "../../x": False,
    "https://example.org/<script>": False,
    "https://user:word@example.org/x": False,
    "https://example.org/ x": False,
}


@pytest.mark.parametrize("link", LINKS)
def test_a_licence_s_link_is_an_address_or_a_file_beside(tmp_path: Path, link: str) -> None:
    """It is inherited from the cards of the inputs, and the Hub makes a link of it."""
    from loratool.provenance.cards import terms_of

    (tmp_path / "README.md").write_text(
        f"---\nlicense: other\nlicense_name: Some Terms 1.0\nlicense_link: {link}\n---\n"
    )
    fields = terms_of(tmp_path).fields
    assert fields["license"] == "other"
    assert ("license_link" in fields) is LINKS[link]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_errors_notes_and_findings_are_safe_whoever_made_them(payload: str) -> None:
    """A sentence that repeats foreign text without care is shown safely all the same."""
    evil = PAYLOADS[payload]
    for text in (
        str(InputError(evil, [evil])),
        str(Note("x", evil)),
        str(Note("x", "y").under(evil)),
        Finding("note", "x", evil, evil).message,
        Finding("note", "x", evil, evil).repair,
        printable(evil),
        escaped(evil),
    ):
        assert hidden(text) == []
    assert "\n" not in str(Note("x", evil))
    assert "\n" not in printable(evil)


def test_every_character_is_safe_or_escaped() -> None:
    """Over all of Unicode: what stays is visible, and what is visible stays, half surrogates included."""
    every = "".join(map(chr, range(0x110000)))
    unsafe = set(hidden(every))
    assert hidden("".join(set(escaped(every)))) == []
    visible = "".join(c for c in every if unicodedata.category(c)[0] in "LNPS" and f"U+{ord(c):04X}" not in unsafe)
    assert escaped(visible) == visible
    assert escaped("aä中🙂 ‖ΔW‖ ❤️") == "aä中🙂 ‖ΔW‖ ❤️"


def test_names_that_are_no_unicode_are_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file system gives any bytes; Python makes half surrogates of them, which no terminal can be sent."""
    name = os.fsdecode(b"one\xff\x9b31m")
    write_models(tmp_path, HARMLESS)
    folder = tmp_path / name
    shutil.copytree(tmp_path / f"one{HARMLESS}", folder)
    (folder / os.fsdecode(b"\xfe.txt")).write_text("x")
    for words in (
        ["inspect", str(folder), "--check"],
        ["rescale", str(folder), "-o", str(tmp_path / "out"), "--scale", "2"],
    ):
        assert cli.run(words) == 0
        shown = capsys.readouterr()
        assert hidden(shown.out) == hidden(shown.err) == []
    check_card((tmp_path / "out" / "README.md").read_text())
