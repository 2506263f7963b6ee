"""The path as in `bench/paths.py`, for the programs of this folder. Not a program."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT: Path = runpy.run_path(str(Path(__file__).resolve().parents[1] / "paths.py"))["ROOT"]
