"""Where the repository lies, and the adapters of others that some tests read where they are to be had."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "loratool"
SHARED = ROOT.parent / "shared"
REAL = SHARED / "real-adapters"
