"""How a caller follows a conversion and cancels it, and the bar that is drawn when nobody else follows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Protocol

from tqdm import tqdm

from pyllamaernie.errors import CancelledError


class Progress(Protocol):
    """What a caller may pass to follow the work; `advance` cancels it by returning False."""

    def start(self, total: int, unit: str, text: str) -> None: ...
    def advance(self, n: int) -> bool | None: ...
    def close(self) -> None: ...


class Bar:
    """A bar on standard error when that is a terminal and PYLLAMAERNIE_PROGRESS is not 0."""

    def start(self, total: int, unit: str, text: str) -> None:
        off = not sys.stderr.isatty() or os.environ.get("PYLLAMAERNIE_PROGRESS") == "0"
        self._bar = tqdm(
            total=total, unit=unit, desc=text, unit_scale=True, unit_divisor=1024, disable=off, leave=False
        )

    def advance(self, n: int) -> None:
        self._bar.update(n)

    def close(self) -> None:
        self._bar.close()


def cancellable(progress: Progress) -> Callable[[int], None]:
    """`progress.advance` as a function that raises CancelledError when it returns False."""

    def advance(n: int) -> None:
        if progress.advance(n) is False:
            raise CancelledError("conversion cancelled")

    return advance
