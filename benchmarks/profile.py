"""Where the time of one merge goes, by stage and by thread.

    python benchmarks/profile.py llama-3.2-1b
    python benchmarks/profile.py llama-3-8b --device cuda --where /dev/shm --workers 12
    python benchmarks/profile.py --base BASE --adapter ADAPTER

Base and adapter are made in a real model's shape in `--where`, by default the system's folder for temporary files, and
removed afterwards, and so is the output. The table is that of `loratool merge -vv`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from running import apart, environment, scratch, set_cache
from shadowed import give_way
from shapes import SHAPES, make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--base", type=Path, help="a base that is there, in place of one that is made")
    parser.add_argument("--adapter", type=Path, help="its adapter")
    parser.add_argument("--where", type=Path, help="a folder for inputs and output")
    parser.add_argument("--cold", action="store_true", help="have the kernel forget the inputs first")
    parser.add_argument("more", nargs="*", help="options of `loratool merge`, after --")
    options, more = parser.parse_known_args()
    if (options.base is None) != (options.adapter is None):
        parser.error("--base and --adapter are given together")
    with scratch(options.where, "profile") as home:
        base, adapter = options.base, options.adapter
        if base is None:
            apart(make, SHAPES[options.shape], home)
            base, adapter = home / "base", home / "adapter"
            set_cache(home, warm=not options.cold)
        words = ["merge", str(base), str(adapter), "-o", str(home / "out"), "-vv", *options.more, *more]
        done = subprocess.run([sys.executable, "-m", "loratool", *words], env=environment(), check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
else:
    give_way("profile")
