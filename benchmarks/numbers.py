"""Write the numbers of the pages from results of commits, or check that no other number stands there.

python benchmarks/numbers.py RESULT.json...     keeps the results in benchmarks/results and writes the pages
python benchmarks/numbers.py                    writes the pages from the kept results
python benchmarks/numbers.py --check            says what differs, and fails if anything does
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from pages import main

    main()
else:
    from shadowed import give_way

    give_way("numbers")
