"""Native log lines into `logging`.

The compiled module collects lines in a bounded queue and never takes the GIL for them; they are fetched here between
calls. Loggers: `pyllamaernie.ggml`, `.mtmd`, `.engine`. Nothing is printed unless the program asks for it.
"""

from __future__ import annotations

import logging
import sys
import threading

from pyllamaernie import _core

ROOT = logging.getLogger("pyllamaernie")
ROOT.addHandler(logging.NullHandler())

_LOGGERS = [logging.getLogger(f"pyllamaernie.{name}") for name in ("ggml", "mtmd", "engine")]
# ggml's levels: 0 none, 1 debug, 2 info, 3 warning, 4 error, 5 continues the line before
_LEVELS = {0: logging.INFO, 1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUES = 5
_lock = threading.Lock()


def set_level() -> None:
    """Tell native code which lines nobody would see, so that they are never written. Errors are always kept."""
    level = min(logger.getEffectiveLevel() for logger in _LOGGERS)
    native = 1 if level <= logging.DEBUG else 2 if level <= logging.INFO else 3 if level <= logging.WARNING else 4
    _core.log_set_level(native)


def drain() -> list[str]:
    """Pass on what native code has logged since the last call; returns the error lines among it, oldest first."""
    with _lock:
        lines, n_dropped = _core.log_drain()
    joined: list[tuple[int, int, str]] = []
    for source, level, text in lines:
        if joined and joined[-1][0] == source and (level == _CONTINUES or not joined[-1][2].endswith("\n")):
            joined[-1] = (source, joined[-1][1], joined[-1][2] + text)
        else:
            joined.append((source, 2 if level == _CONTINUES else level, text))
    errors = []
    for source, level, text in joined:
        text = text.rstrip()
        if not text.strip("."):
            continue
        _LOGGERS[source].log(_LEVELS.get(level, logging.INFO), "%s", text)
        if level == 4:
            errors.append(text)
    if n_dropped:
        ROOT.warning("%d native log lines were dropped", n_dropped)
    return errors


def last_error() -> str:
    """Pass on what native code has logged; its last error, without what stands before the first colon, or nothing."""
    errors = drain()
    return errors[-1].split(": ", 1)[-1] if errors else ""


def log_to_stderr(level: int | str = logging.INFO) -> logging.Handler:
    """Show the package's log on stderr, for scripts; returns the handler so that it can be removed again."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    ROOT.addHandler(handler)
    ROOT.setLevel(level)
    set_level()
    return handler
