"""What a person reads is said as an English-speaking engineer would say it: no phrase that reads as if translated.

Read are the sentences of `loratool/` (messages, notes, help, cards, results), the docstrings of its public functions,
classes and commands, and the text of the pages, without code. The changelog keeps the words of its releases.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT

NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "fixtures/README.md")
PAGES = (*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").rglob("*.md")))
REPORTS = [ROOT / "loratool" / "pictures" / name for name in ("page.html", "page.js")]
SOURCES = sorted((ROOT / "loratool").rglob("*.py"))
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)

# A phrase, and what to say in its place.
REFUSED = {
    r"\b(?:is|are) none\b": "say what it is: 'is not a number', 'there are no tensors'",
    r"\b(?:is|are|as|be) no (?:whole|regular|plain|branch|text|JSON|number|list|object|folder|file|model|adapter"
    r"|matrix|matrices|multiple|sum|siblings|modules|path|size|part|address|products?|\.safetensors)\b": "'is not a …'",
    r"\bno (?:safetensors|regular) file:": "'not a … file'",
    r"\bcannot be meant\b": "'must be between 1 and 1024 (got 5000)'",
    r"\btold\b|\btells (?:of|no|what|how|which|whether)\b": "'is reported', 'says', 'shows'",
    r"\bbut for\b": "'except'",
    r"\bbeside\b": "'next to', 'in the same folder', 'with', 'unmerged'",
    r"\bfor who(?:ever)? wants\b": "'if you want'",
    r"\bgoes on\b|\bgo on\b": "'continues', 'resumes'",
    r"\bby (?:itself|themselves)\b": "'alone', 'separately', 'automatically'",
    r"\blies? to each other\b|\blies? apart\b": "'compare', 'are separate'",
    r"\b(?:is|are) wanted\b|\bwanted (?:is|are)\b": "'expected …'",
    r"\bwho (?:has|may|tries|wants|keeps)\b": "'if you …', 'a user who'",
    r"\bas who\b": "'as a user who'",
    r"(?:^|[.;] )(?:Who|What) (?:is|was|has|can|may|cannot|lies|stands) [^?]*$": "begin with the noun",
    r"\bno rule gives\b|\bhas no place\b|\bhave no place\b|\bfinds? no place\b": "'was not recognised', 'cannot store'",
    r"\b(?:this|our|their|one) kin\b|\band its kin\b": "'similar …'",
    r"\b(?:way|ways) round\b": "'orientation'",
    r"\btakes? turns\b": "'alternate'",
    r"\b(?:passes|passed|pass) over\b": "'ignores', 'skips'",
    r"\b(?:that|which|as) (?:loratool|nobody) (?:does not know|knows)\b": "'unknown …'",
    r"\bfor want of\b": "'because there is no'",
    r"\b(?:is|are) there(?: twice| already)?(?:[.,;:]|$)": "'exists', 'is present', 'is duplicated'",
    r"\bin all\b(?=[.,;]|$)": "'in total'",
    r"\bsay so with\b|\bsays so\b": "'pass …'",
    r"\bthe base has not\b|\bBASE has not\b|\bREPO has not\b": "'… lacks'",
    r"\bfor one(?:[.,;:)]|$)": "'such as …'",
    r"\btakes? (?:it|them) (?:all|too|for)\b": "'reads it as', 'includes'",
    r"\b(?:said|says) no\b": "'failed', 'refused'",
    r"\bforbids to\b": "'does not allow'",
    r"\b(?:recipe|shelf|dial)s?\b": "a word of the field: 'method', 'setting'",
    r"\bmeetings?\b": "a word of the field: 'pair'",
    r"\bhome\b": "'folder', 'file', 'tensor'",
    r"\blandings?\b|\blands on\b": "a word of the field: 'matching weight'",
    r"\bfolds?\b|\bfolded\b|\bfolding\b": "'merge'",
    r"\btake(?:s|n)? (?:it|them|the \w+) out\b": "'remove'",
    r"\bgive (?:it|one|the|another|its|as|them|a|--)\b": "'pass', 'choose'",
    r"\bmend\b": "'fix', 'correct'",
    r"\bwhoever made\b": "'whichever tool made'",
    r"\bbefore quantisation\b": "'the unquantised model'",
    r"\bwhich takes (?:the|a|every)\b": "'so … is needed', 'which needs'",
    r"\bexclude each other\b": "'are mutually exclusive'",
    r"\b(?:is|are) worked out\b": "'is computed'",
    r"\bone (?:\w+ )*a line\b": "'one per line'",
    r"\bwhat became of\b": "'what happened to'",
    r"\btaken to (?:be|have)\b": "'assumed to be'",
    r"\b(?:does|do) not go with\b|\b(?:does|do) not go into\b": "'does not match', 'does not fit'",
    r"\bno more than (?:its|their) share\b|\b(?:a|the|its|their) share of\b": "'fraction', 'part'",
}


@dataclass(frozen=True)
class Sentence:
    """A text that a person reads, and where it stands."""

    where: str
    text: str


def literal(node: ast.expr) -> str | None:
    """The words of a string or an f-string, `…` for what is filled in; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def is_public(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")


def exported() -> set[str]:
    """The names that `import loratool` gives, and those of the commands."""
    import loratool
    from loratool.cli import COMMANDS

    return {name.rpartition(".")[2] for name in loratool.__all__} | set(COMMANDS)


def sentences_of(path: Path, public: set[str]) -> Iterator[Sentence]:
    """Every sentence of a module: strings with a space in them, and the docstrings of what is public."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    docstrings: dict[int, bool] = {}
    inside: set[int] = set()
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings[id(first.value)] = is_public(node) and getattr(node, "name", "") in public
        if isinstance(node, ast.JoinedStr):
            inside.update(map(id, node.values))
    for node in nodes:
        if not isinstance(node, ast.expr) or id(node) in inside or not docstrings.get(id(node), True):
            continue
        text = literal(node)
        if text and " " in text.strip():
            yield Sentence(f"{path.relative_to(ROOT)}:{node.lineno}", CODE.sub("``", text))


def paragraphs_of(page: Path) -> Iterator[Sentence]:
    """Every paragraph of a page, without code."""
    text = CODE.sub(lambda found: "``" + "\n" * found[0].count("\n"), page.read_text(encoding="utf-8"))
    line = 1
    for block in re.split(r"(\n\s*\n)", text):
        if block.strip():
            yield Sentence(f"{page.relative_to(ROOT)}:{line}", block)
        line += block.count("\n")


def refused(sentence: Sentence) -> Iterator[str]:
    text = re.sub(r"\s+", " ", sentence.text)
    for pattern, better in REFUSED.items():
        for found in re.finditer(pattern, text):
            near = text[max(0, found.start() - 50) : found.end() + 50]
            yield f"{sentence.where}: {found[0]!r} in …{near}…: {better}"


def test_sentences_of_the_package_are_plain_english() -> None:
    public = exported()
    found = [line for path in SOURCES for each in sentences_of(path, public) for line in refused(each)]
    assert not found, "\n".join(found)


def test_labels_of_the_html_report_are_plain_english() -> None:
    page, script = (report.read_text(encoding="utf-8") for report in REPORTS)
    words = re.findall(r">([^<@]+)<", page)
    words += ["".join(pair) for pair in re.findall(r'"([^"\n]* [^"\n]*)"|`([^`\n]* [^`\n]*)`', script)]
    assert words
    found = [line for each in words for line in refused(Sentence("the HTML report", each))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("translated", "plain"),
    [
        ("5000 workers cannot be meant; 1 to 1024 can", "workers must be between 1 and 1024 (got 5000)"),
        ("is no JSON object", "is not a JSON object"),
        ("every problem of an input is told at once", "all problems of an input are reported at once"),
        ("What comes back is the base but for two roundings", "You get the base back, except for two roundings"),
        ("a file beside the adapter's weights", "a file in the adapter's folder"),
        ("for who wants the base again", "if you want the base back"),
        ("the same command goes on where it stopped", "run the same command again to continue"),
        ("each layer by itself", "each layer separately"),
        ("how two adapters lie to each other", "how two adapters compare"),
        ("a whole number from 1 on is wanted", "expected a whole number of at least 1"),
    ],
)
def test_a_phrase_that_reads_as_if_translated_is_found(translated: str, plain: str) -> None:
    assert list(refused(Sentence("", translated)))
    assert not list(refused(Sentence("", plain)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_plain_english(page: Path) -> None:
    found = [line for each in paragraphs_of(page) for line in refused(each)]
    assert not found, "\n".join(found)
