"""Where the programs of this folder find what they share: import it before anything else of ours. Not a program.

Puts this folder, the tests' helpers and the examples on the path. The repository itself leaves the path: the installed
package is measured, not the sources beside this folder, which have no native module.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = [str(ROOT / name) for name in ("bench", "tests/support", "examples")]

sys.path[:] = [*SHARED, *(p for p in sys.path if p not in SHARED and Path(p or ".").resolve() != ROOT)]
