"""The colours of figures and pages in light and in dark, and the style sheet of figures, once with variables and once without.

In a page colours are custom properties. A file is also opened by programs that know none (librsvg, Inkscape), so there each
rule has the light colour itself, and a media query the dark one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

LEVELS = 24  # of a scale: as many as can be told apart on a map
BASIC: Mapping[str, tuple[str, str]] = {  # name → its colour in light and in dark
    "paper": ("#f7f6f3", "#12151a"),
    "card": ("#ffffff", "#1a1f26"),
    "ink": ("#1c2127", "#e7e9ec"),
    "soft": ("#5c656f", "#9aa4af"),
    "line": ("#e3e1dc", "#2b323b"),
    "faint": ("#8d99a5", "#5f6b77"),
    "accent": ("#2d6a8e", "#6bbccb"),
    "accent-ink": ("#1f5575", "#8fd0da"),
    "warn": ("#a8381f", "#f2a48f"),
    "warn-bg": ("#fbeae5", "#3a211c"),
    "bad": ("#c2452d", "#e8775c"),
    "quiet": ("#d8d6d0", "#39424d"),
}
SERIES = (  # of bars, of lines that are compared, and of states
    ("#2d6a8e", "#6bbccb"),
    ("#d99136", "#e3a857"),
    ("#4f9b76", "#7fcca4"),
    ("#8a5ea8", "#b795d3"),
    ("#b4573f", "#e08e78"),
    ("#7b8794", "#9aa7b5"),
    ("#9aa33a", "#c3cb6b"),
    ("#c0608f", "#e295bb"),
)
# From little to much. On dark paper much is light, so that what stands out is the same.
SEQUENTIAL = (
    ("#e9f4ea", "#bfe4c6", "#7fccb5", "#43aeb0", "#358aa5", "#38659c", "#413d7b", "#2c1b45"),
    ("#2a2b45", "#332c55", "#3d4585", "#37659e", "#348fa7", "#40b7ad", "#8ad9b1", "#e2f6e8"),
)
DIVERGING = (  # from −1 through 0 to 1
    ("#8f2d1c", "#c9654a", "#ecb29d", "#f2efe9", "#a9cbd8", "#4d8fac", "#1c4f70"),
    ("#f2a48f", "#c9654a", "#6f3a2e", "#242a32", "#2c5368", "#4593ab", "#a5e0e6"),
)

STYLE = """\
svg text { fill: var(--soft); font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
svg text.n { fill: var(--ink); font-size: 12px; }
svg text.h { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg text.i { fill: var(--card); }
svg text.o { fill: var(--ink); }
svg .ground { fill: var(--card); }
svg .none { fill: var(--quiet); }
svg .bad { fill: var(--bad); }
svg .quiet { fill: var(--quiet); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--faint); fill: none; }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 4; }
svg .l { fill: none; stroke: var(--faint); stroke-opacity: .2; stroke-width: 10; }
svg .s { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .lines .s { stroke-width: 20; }
svg .chosen { stroke: var(--accent); }
svg .dot { fill: var(--accent); stroke: var(--card); stroke-width: 2; }
"""


def mixed(one: str, other: str, part: float) -> str:
    """The colour at a part of the way from one to the other."""
    pairs = zip(bytes.fromhex(one[1:]), bytes.fromhex(other[1:]), strict=True)
    return "#" + bytes(round(a + (b - a) * part) for a, b in pairs).hex()


def scale(anchors: Sequence[str]) -> list[str]:
    """`LEVELS` colours through the anchors, in equal steps."""
    steps = [at * (len(anchors) - 1) / (LEVELS - 1) for at in range(LEVELS)]
    lows = [min(int(step), len(anchors) - 2) for step in steps]
    return [mixed(anchors[low], anchors[low + 1], step - low) for step, low in zip(steps, lows, strict=True)]


@cache
def scheme(dark: bool) -> Mapping[str, str]:
    """All colours of a scheme: those with names, `s0` … of series, `q0` … of the scale up, `d0` … of the one both ways."""
    found = {name: pair[dark] for name, pair in BASIC.items()}
    found |= {f"s{at}": pair[dark] for at, pair in enumerate(SERIES)}
    found |= {f"q{at}": colour for at, colour in enumerate(scale(SEQUENTIAL[dark]))}
    return found | {f"d{at}": colour for at, colour in enumerate(scale(DIVERGING[dark]))}


@cache
def rules() -> str:
    """The style sheet of figures, with variables for colours."""
    fills = [f"svg .{letter}{at} {{ fill: var(--{letter}{at}); }}" for letter in "qd" for at in range(LEVELS)]
    fills += [
        f"svg .s{at} {{ fill: var(--s{at}); }} svg .s.s{at} {{ fill: none; stroke: var(--s{at}); }}"
        for at in range(len(SERIES))
    ]
    return STYLE + "\n".join(fills) + "\n"


def variables(dark: bool) -> str:
    """The declarations of a scheme's custom properties."""
    return " ".join(f"--{name}: {colour};" for name, colour in scheme(dark).items())


def style_of_page() -> str:
    """Colours and figures of a page: by the reader's scheme on a screen, and light on paper."""
    return (
        f":root {{ {variables(False)} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables(True)} }} }}\n{rules()}"
    )


def style_of_file(markup: str) -> str:
    """The style sheet of a file with some markup: the rules that it needs, with the colours themselves."""
    used = {name for names in re.findall(r'class="([^"]*)"', markup) for name in names.split()}
    kept = "\n".join(rule for rule in re.findall(r"svg [^{}]*\{[^{}]*\}", rules()) if names_of(rule) <= used)
    return f"{coloured(kept, False)}\n@media (prefers-color-scheme: dark) {{\n{coloured(kept, True)}\n}}"


def coloured(style: str, dark: bool) -> str:
    """A style sheet with the colours of a scheme in the place of variables."""
    return re.sub(r"var\(--([\w-]+)\)", lambda name: scheme(dark)[name[1]], style)


def names_of(rule: str) -> set[str]:
    """The classes that a rule is for."""
    return set(re.findall(r"\.([a-z]\w*)", rule.partition("{")[0]))
