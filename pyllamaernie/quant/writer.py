"""A model with other types for its tensors, written in a stream: the header first, then pieces wherever they belong.

All sizes are known beforehand, so every tensor has its place and threads work on pieces of a few MiB without waiting
for each other; memory does not grow with the model. A piece of a stock type has the bytes that llama-quantize writes.
What is unfinished is NAME.part with a journal (`journal.py`); the same job goes on from there, after a kill -9 too. The
output appears under its name when it is whole and on the disk.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from pyllamaernie import files
from pyllamaernie.errors import CancelledError, CorruptModelError, DiskSpaceError, QuantizeError
from pyllamaernie.gguf.file import Key
from pyllamaernie.quant import native
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.job import Job, OutTensor, plan_job
from pyllamaernie.quant.journal import Done, Journal, discard, part_path
from pyllamaernie.quant.source import PIECE_VALUES, ModelSource, Piece

log = logging.getLogger("pyllamaernie.quant")

Item = TypeVar("Item")

FLOATS = ("F32", "F16", "BF16")

# Time of a weight in nanoseconds, for the estimate of what is left. Measured by bench/quantize_throughput.py --types.
_NS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 4, "MXFP4": 5, "NVFP4": 18, "Q2_0": 6, "Q4_0": 23, "Q5_0": 23, "Q6_K": 27}
_NS |= {"Q1_0": 21, "Q3_K": 33, "Q4_1": 100, "Q5_1": 100, "Q4_K": 100, "Q5_K": 105, "Q2_K": 125, "IQ1_M": 170}
_NS |= {"IQ2_S": 175, "IQ4_NL": 190, "IQ4_XS": 190, "IQ3_S": 250, "IQ1_S": 310, "IQ3_XXS": 400, "IQ2_XXS": 460}
_NS |= {"IQ2_XS": 740, "CCQ2_B": 900, "CCQ2": 12000, "CCQ2_25": 12000, "CCQ2_5": 12000, "CCQ2_75": 12000}
_NS_UNKNOWN = 100
_PIECE_NS = 10**9 // 4  # a piece takes a quarter of a second at most, so that an interruption is soon over
_PIECE_VALUES_MIN = 2**14


@dataclass(frozen=True)
class Progress:
    """How far the work is. `share` runs from 0 to 1 by estimated time; bytes are those of the output."""

    stage: str  # check (what an earlier run wrote) or write
    share: float
    n_bytes: int
    n_bytes_total: int
    tensor: str
    seconds_left: float | None


@dataclass(frozen=True)
class WriteResult:
    """What was written. `n_bytes` is the file's size; `n_bytes_kept` came from an earlier run that was cut off."""

    path: Path
    n_bytes: int
    n_bytes_kept: int
    n_tensors: int
    n_params: int
    bpw: float
    seconds: float
    warnings: tuple[str, ...]


def write_quantized(
    source: ModelSource,
    types: Mapping[str, str],
    output: str | os.PathLike[str],
    *,
    importance: Importance | None = None,
    keys: Sequence[Key] = (),
    n_threads: int | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
    resume: bool = True,
    on_progress: Callable[[Progress], bool | None] | None = None,
) -> WriteResult:
    """Write `source` with these types by tensor name; other tensors stay as they are. `keys` are further metadata.

    An interruption (KeyboardInterrupt, or False from `on_progress`) keeps what is done, and the same call goes on from
    there; with `resume=False` nothing is kept, and nothing of an earlier run is used. After any other error nothing is
    left, save when reading or writing failed in the middle: that can be resumed too, and the message says so.
    Raises: InputError, QuantizeError, DiskSpaceError, CorruptModelError, CancelledError.
    """
    job = plan_job(source, types, output, importance=importance, keys=keys, allow_requantize=allow_requantize)
    return run_job(job, n_threads=n_threads, overwrite=overwrite, resume=resume, on_progress=on_progress)


def run_job(
    job: Job,
    *,
    n_threads: int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    on_progress: Callable[[Progress], bool | None] | None = None,
) -> WriteResult:
    """Write the file of a job; see `write_quantized`."""
    from pyllamaernie.machine import n_cpu

    started = time.monotonic()
    check_output(job.output, job.inputs, overwrite)
    try:
        journal = Journal(job.output, job.digest, fresh=not resume)
    except OSError as error:
        raise QuantizeError(f"{job.output.parent}: cannot be written ({error.strerror or error})") from None
    keep = False
    try:
        _reserve(job, bool(journal.done))
        run = _Run(job, journal, n_threads or n_cpu(), on_progress)
        n_kept = run.check() if journal.done else 0
        try:
            run.write()
        except (KeyboardInterrupt, CancelledError):
            keep = resume
            raise
        except OSError as error:
            if isinstance(error, CorruptModelError):
                raise
            keep = resume and run.n_written > 0
            raise QuantizeError(
                f"{error.filename or job.output}: {error.strerror or error}"
                + (f"; {part_path(job.output).name} keeps what is done, the same command goes on" if keep else "")
            ) from None
        _finish(job)
    except (KeyboardInterrupt, CancelledError):
        keep = resume
        raise
    finally:
        journal.close()
        if not keep:
            discard(job.output)
    seconds = time.monotonic() - started
    return WriteResult(job.output, job.n_bytes, n_kept, len(job.tensors), job.n_params, job.bpw, seconds, job.warnings)


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Raises InputError when the output's name cannot be used."""
    files.check_output(output, overwrite, inputs)


def _reserve(job: Job, is_resumed: bool) -> None:
    """The file at its full size with its header, its room on the disk taken where the system can do that.

    Raises: DiskSpaceError when there is no room; QuantizeError when the folder does not take files.
    """
    path, folder = part_path(job.output), job.output.absolute().parent
    try:
        has = path.stat().st_blocks * 512 if is_resumed and hasattr(os.stat_result, "st_blocks") else 0
        free = shutil.disk_usage(folder).free + has
        if job.n_bytes > free:
            raise DiskSpaceError(f"{folder}: {job.n_bytes / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
        with open(path, "r+b" if is_resumed else "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, job.n_bytes)
            except (AttributeError, OSError) as error:
                if getattr(error, "errno", None) in _NO_ROOM:
                    raise
                file.truncate(job.n_bytes)
            file.write(job.header)
    except DiskSpaceError:
        raise
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskSpaceError(f"{folder}: no room for {job.n_bytes / 1e9:.2f} GB ({error.strerror})") from None
        raise QuantizeError(f"{folder}: cannot be written ({error.strerror or error})") from None


def _errors(*names: str) -> frozenset[int]:
    import errno

    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


_NO_ROOM = _errors("ENOSPC", "EFBIG", "EDQUOT")


def _finish(job: Job) -> None:
    """To the disk, then under its name, then that too to the disk."""
    with open(part_path(job.output), "r+b") as file:
        os.fsync(file.fileno())
    os.replace(part_path(job.output), job.output)
    if os.name != "nt":
        folder = os.open(job.output.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class _Run:
    """Threads over pieces. The caller's thread reports, and hears of interruptions."""

    def __init__(
        self, job: Job, journal: Journal, n_threads: int, on_progress: Callable[[Progress], bool | None] | None
    ) -> None:
        self._job, self._journal, self._n_threads, self._on_progress = job, journal, n_threads, on_progress
        self._done: Done = dict(journal.done)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._cost = self._cost_total = 0.0
        self._tensor = ""
        self._bytes = self.n_written = 0

    def check(self) -> int:
        """Compare what an earlier run wrote with its checksums, drop what differs; returns the bytes that are right."""
        path = part_path(self._job.output)
        claims = [(t, row, n, crc) for (t, row), (n, crc) in sorted(self._done.items())]
        good: Done = {}
        self._cost_total, self._cost, self._bytes = float(len(claims)), 0.0, 0

        def work(claim: tuple[int, int, int, int]) -> None:
            number, row, n, crc = claim
            if number >= len(self._job.tensors):
                return
            tensor = self._job.tensors[number]
            with open(path, "rb", buffering=0) as file:
                file.seek(tensor.offset + row * tensor.row_bytes)
                data = file.read(n * tensor.row_bytes)
            with self._lock:
                self._cost += 1
                if zlib.crc32(data) == crc and 0 <= row and row + n <= tensor.weights.n_rows:
                    good[number, row] = n, crc
                    self._bytes += len(data)

        self._in_threads("check", iter(claims), work)
        if len(good) < len(claims):
            log.warning("%s: %d of %d pieces are done again", path, len(claims) - len(good), len(claims))
        self._done = good
        return self._bytes

    def write(self) -> None:
        """Every piece that is not there yet."""
        self._cost, self._cost_total = 0.0, sum(_cost(t, t.weights.n_rows) for t in self._job.tensors)
        for (number, _), (n, _) in self._done.items():
            self._cost += _cost(self._job.tensors[number], n)
        self._in_threads("write", self._missing(), self._write_piece)

    def _missing(self) -> Iterator[tuple[OutTensor, Piece]]:
        rows_done: dict[int, int] = {}
        for (number, _), (n, _) in self._done.items():
            rows_done[number] = rows_done.get(number, 0) + n
        for tensor in self._job.tensors:
            if rows_done.get(tensor.number) == tensor.weights.n_rows:
                continue
            n_rows = 0
            for piece in tensor.weights.pieces(_piece_values(tensor)):
                n_rows += piece.n_rows
                if self._done.get((tensor.number, piece.first_row), (0, 0))[0] != piece.n_rows:
                    yield tensor, piece
            if n_rows != tensor.weights.n_rows:
                raise AssertionError(f"{tensor.weights.name}: {n_rows} rows came of {tensor.weights.n_rows}")

    def _write_piece(self, item: tuple[OutTensor, Piece]) -> None:
        tensor, piece = item
        data = _encoded(tensor, piece)
        view = data.data.cast("B")
        crc = zlib.crc32(view)
        with open(part_path(self._job.output), "r+b", buffering=0) as file:
            file.seek(tensor.offset + piece.first_row * tensor.row_bytes)
            while view:
                view = view[file.write(view) :]
        self._journal.add(tensor.number, piece.first_row, piece.n_rows, crc)
        with self._lock:
            self._cost += _cost(tensor, piece.n_rows)
            self._bytes += data.nbytes
            self.n_written += data.nbytes
            self._tensor = tensor.weights.name

    def _in_threads(self, stage: str, items: Iterator[Item], work: Callable[[Item], None]) -> None:
        """`work` on every item; an error or an interruption lets the pieces that are begun come to their end."""
        taking, n_left, ended = threading.Lock(), [self._n_threads], threading.Event()

        def loop() -> None:
            try:
                while not self._stop.is_set():
                    with taking:
                        item = next(items, None)
                    if item is None:
                        break
                    work(item)
            except BaseException as error:
                with self._lock:
                    self._error = self._error or error
                self._stop.set()
            with self._lock:
                n_left[0] -= 1
                if n_left[0] == 0:
                    ended.set()

        began, at_start = time.monotonic(), self._cost
        for i in range(self._n_threads):
            threading.Thread(target=loop, name=f"quantize-{i}", daemon=True).start()
        # not by join(): before Python 3.13 an interrupted join takes a running thread for one that has ended
        try:
            while not ended.wait(0.1):
                self._report(stage, began, at_start)
        finally:
            self._stop.set()
            while not ended.is_set():
                with contextlib.suppress(KeyboardInterrupt):  # the first one is on its way already
                    ended.wait()
        self._stop.clear()
        if self._error is not None:
            raise self._error
        self._report(stage, began, at_start)

    def _report(self, stage: str, began: float, at_start: float) -> None:
        if self._on_progress is None:
            return
        elapsed, gained = time.monotonic() - began, self._cost - at_start
        left = elapsed * (self._cost_total - self._cost) / gained if gained > 0 else None
        share = min(1.0, self._cost / self._cost_total) if self._cost_total else 1.0
        total = sum(t.n_bytes for t in self._job.tensors)
        if self._on_progress(Progress(stage, share, self._bytes, total, self._tensor, left)) is False:
            raise CancelledError("quantization cancelled")


def _encoded(tensor: OutTensor, piece: Piece) -> np.ndarray:
    """The piece in the bytes of the output. Shapes: -> (n_rows, row bytes) uint8"""
    weights, data = tensor.weights, piece.load()
    name = weights.name
    try:
        if tensor.type == weights.type and tensor.type not in FLOATS:
            if tensor.type in native.TYPES and not native.validate(tensor.type, data):
                raise QuantizeError(f"a scale is no number, in the {piece.n_rows} rows from {piece.first_row} on")
            return np.ascontiguousarray(data)
        columns = None if tensor.columns is None else tensor.columns[piece.first_row // weights.rows_per_matrix]
        return native.requantize(tensor.type, weights.type, data, weights.n_cols, columns, piece.first_row)
    except QuantizeError as error:
        raise QuantizeError(f"{name}: {error}") from None


def _piece_values(tensor: OutTensor) -> int:
    """Depends on nothing but the tensor: the pieces of a job are the same in every run."""
    return max(_PIECE_VALUES_MIN, min(PIECE_VALUES, int(_PIECE_NS / _cost(tensor, 1) * tensor.weights.n_cols)))


def _cost(tensor: OutTensor, n_rows: int) -> float:
    same = tensor.type == tensor.weights.type
    return n_rows * tensor.weights.n_cols * (1 if same else _NS.get(tensor.type, _NS_UNKNOWN))
