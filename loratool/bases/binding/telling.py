"""Names for people: many in one line, and the nearest to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.errors import printable
from loratool.files.safefile import TensorInfo
from loratool.files.system import shell_word
from loratool.grouping import by_key
from loratool.templates import Numbers, grouped, template_of

MOST_COMPARED = 500  # templates that a search for the nearest one looks at
MOST_SEARCHED = 64  # templates for which the nearest one is searched: more than a message shows


class Nearest:
    """For a name that the base has not, the nearest that it has."""

    def __init__(self, templates: Mapping[str, Mapping[Numbers, str]], tensors: Mapping[str, TensorInfo]) -> None:
        self.templates, self.tensors = templates, tensors
        self.found: dict[str, str | None] = {}

    def reason(self, target: str, proposal: str = "") -> str:
        """That the base has no such weight, with the `--map` that leads to one, or else the nearest that it has."""
        if proposal:
            return f"the base has no such weight; if it is the same layer, pass --map {printable(shell_word(proposal))}"
        template, numbers = template_of(target)
        if template not in self.found:
            searched = len(self.found) < MOST_SEARCHED
            self.found[template] = nearest(template, sorted(self.templates)) if searched else None
        there = self.found[template]
        if there is None:
            return "the base has no such weight"
        members = self.templates[there]
        near = members.get(numbers) or members[min(members, key=lambda found: tuple(map(int, found)))]
        return (
            f"the base has no such weight; the closest name is {printable(near)} {list(self.tensors[near].shape)}; if the base "
            "has this layer under another name, pass --map REGEX=TEMPLATE"
        )


def nearest(template: str, known: Sequence[str]) -> str | None:
    """The template most like another: of those with the same last components where there are any."""
    from difflib import get_close_matches

    parts = template.split(".")
    for tail in (3, 2):  # the last one is empty
        if alike := [name for name in known if name.split(".")[-tail:] == parts[-tail:]]:
            known = alike
            break
    found = get_close_matches(template, known[:MOST_COMPARED], n=1, cutoff=0.5)
    return found[0] if found else None


def tell(problems: Mapping[str, str]) -> list[str]:
    """Problems of targets, those that differ in numbers only in one line."""
    alike = by_key(
        ((template_of(target)[0] if "#" not in target else target, template_of(why)[0]), target)
        for target, why in problems.items()
    )
    return [f"{printable(line)}: {problems[targets[0]]}" for targets in alike.values() for line in grouped(targets)]
