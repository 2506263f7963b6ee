"""The unfinished output of a writer: NAME.part, and beside it NAME.part.journal, which says which pieces are in it.

The journal is text: a first line with the job's hash, then one JSON line for each piece, appended once the piece is
written: [tensor number, first row, rows, CRC-32 of its bytes]. A process that dies at any moment leaves a journal whose
last line may be torn, and a piece or two that no line tells of; both are simply done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pyllamaernie.errors import QuantizeError

_FORMAT = 1

# (tensor number, first row) -> (rows, CRC-32)
Done = dict[tuple[int, int], tuple[int, int]]


def part_path(output: Path) -> Path:
    """Where the output grows."""
    return output.with_name(output.name + ".part")


def journal_path(output: Path) -> Path:
    """The journal of an unfinished output."""
    return output.with_name(output.name + ".part.journal")


def request_path(output: Path) -> Path:
    """What was asked for, where more than the writer's job has to be the same to go on (`plan/sized.py`)."""
    return output.with_name(output.name + ".part.request")


def discard(output: Path) -> None:
    """Remove what an earlier run left of an output."""
    for path in (part_path(output), journal_path(output), request_path(output)):
        path.unlink(missing_ok=True)


class Journal:
    """An open journal, held against other processes where the system allows it; `add` may be called by any thread."""

    def __init__(self, output: Path, job: str, *, fresh: bool = False) -> None:
        """Opens or starts the journal of `job`; `done` is what it says of the file: nothing for another job, or if
        `fresh`.

        Raises: QuantizeError while another process writes the same output; OSError.
        """
        self.path = journal_path(output)
        self._file = open(self.path, "a+b")
        self._lock = threading.Lock()
        try:
            _hold(self._file, output)
            self.done: Done = self._read(job) if part_path(output).is_file() and not fresh else {}
            if not self.done:
                self._file.truncate(0)
                self._line({"format": _FORMAT, "job": job})
            elif not self._ends_with_newline():
                self._file.write(b"\n")
            self._file.flush()
        except BaseException:
            self._file.close()
            raise

    def add(self, tensor: int, first_row: int, n_rows: int, crc: int) -> None:
        """Note a piece whose bytes are in the file."""
        with self._lock:
            self._line([tensor, first_row, n_rows, crc])
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _line(self, value: Any) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")

    def _ends_with_newline(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"

    def _read(self, job: str) -> Done:
        self._file.seek(0)
        lines = _json_lines(self._file)
        if next(lines, None) != {"format": _FORMAT, "job": job}:
            return {}
        done: Done = {}
        for line in lines:
            if isinstance(line, list) and len(line) == 4 and all(isinstance(n, int) for n in line):
                done[line[0], line[1]] = line[2], line[3]
        return done


def _json_lines(file: IO[bytes]) -> Iterator[Any]:
    for line in file:
        try:
            yield json.loads(line)
        except ValueError:
            yield None


def _hold(file: IO[bytes], output: Path) -> None:
    """Keep other processes away until the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    with contextlib.suppress(InterruptedError):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QuantizeError(f"{output} is being written by another process") from None
