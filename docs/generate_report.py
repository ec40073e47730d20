"""Write docs/pictures/merge.svg: what `loratool merge` prints, as a terminal shows it, in light and in dark.

python docs/generate_report.py
"""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path

import loratool
from loratool.demo import demo

PICTURE = Path(__file__).parent / "pictures" / "merge.svg"
COMMAND = "loratool merge ./base ./adapter -o ./merged"
SIZE, LINE, PAD = 13, 20, 18  # pixels: of letters, from line to line, around all
WIDTH = 0.602 * SIZE  # of a letter in most monospaced fonts
STYLE = """\
text { font: %dpx ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328; white-space: pre; }
rect { fill: #f6f8fa; stroke: #d1d9e0; }
.typed { font-weight: 600; } .name { fill: #59636e; } .gain { fill: #1a7f37; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } rect { fill: #161b22; stroke: #30363d; }
  .name { fill: #9198a1; } .gain { fill: #3fb950; }
}"""


def lines_of(report: str) -> list[tuple[str, str, str]]:
    """Each line as its class, the name in front and the rest."""
    width = report.splitlines()[0].index("merged into") + report.splitlines()[0].rindex("  ") + 2
    return [("gain" if line.startswith("gain") else "", line[:width], line[width:]) for line in report.splitlines()]


def picture(report: str) -> str:
    """The SVG of a command and its report."""
    rows = [f'<tspan class="typed">$ {escape(COMMAND)}</tspan>']
    for kind, name, rest in lines_of(report):
        rows.append(f'<tspan class="name">{escape(name)}</tspan><tspan class="{kind}">{escape(rest)}</tspan>')
    longest = max(len(line) for line in [f"$ {COMMAND}", *report.splitlines()])
    wide, high = round(longest * WIDTH) + 2 * PAD, len(rows) * LINE + 2 * PAD
    texts = [f'<text x="{PAD}" y="{PAD + LINE * n + SIZE}">{row}</text>' for n, row in enumerate(rows)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="img">'
    title = f"<title>{escape(COMMAND)}: the report of a merge</title>"
    box = f'<rect x="0.5" y="0.5" width="{wide - 1}" height="{high - 1}" rx="8"/>'
    return "\n".join([head, title, f"<style>\n{STYLE % SIZE}\n</style>", box, *texts, "</svg>", ""])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        demo(home / "demo")
        made = loratool.merge(home / "demo" / "base", [home / "demo" / "adapter"], home / "merged", device="cpu")
        PICTURE.write_text(picture(str(made).replace(str(home), ".")), encoding="utf-8")


if __name__ == "__main__":
    main()
