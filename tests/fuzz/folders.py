"""Converts odd folders and counts how it ends: `python tests/fuzz/folders.py --seed 1 --folders 2000`.

Each folder is a sound small checkpoint with something wrong (`odd_folders.py`), converted in a process of its own with
a limit of time and of address space. Fine are a conversion and an error of ours in one line; anything else is told with
how to repeat it, and makes the exit code 1. The same seed gives the same folders.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each thread would reserve address space

import argparse
import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
for folder in ("tests/support", "tests/fuzz"):
    sys.path.insert(0, str(ROOT / folder))

import odd_folders  # noqa: E402

from pyllamaernie import cli  # noqa: E402
from pyllamaernie.cli import convert as _verb  # noqa: E402, F401  (once here and not in each process)
from pyllamaernie.errors import PyllamaernieError  # noqa: E402
from pyllamaernie.gguf.file import read_gguf  # noqa: E402

SECONDS, MEMORY = 10, 2**30
CONVERTED, REFUSED = "converted", "refused"
FINE = (CONVERTED, REFUSED)
_EXIT_CODES = (1, 2, 3, 4, 5)


@dataclass
class Result:
    """How one folder ended: what it came to, the message or trace, what was done to it."""

    number: int
    kind: str
    text: str = ""
    done: list[str] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0.0


def words_of(random: Random, path: Path, original: Path | None, output: Path) -> list[str]:
    """A command line that converts the folder in one of several ways."""
    words = ["convert", str(path), "-o", str(output), "--type", random.choice(("auto", "auto", "f32", "f16", "Q8_0"))]
    if original is not None:
        words += ["--original", str(original)]
    return words + random.choice(([], [], [], ["--dry-run"], ["--no-mmproj", "--no-mtp"])) + ["--debug"]


def convert(seed: int, number: int, bases: Path, home: Path, *, limited: bool = False) -> Result:
    """Makes the folder `number` of a seed, converts it here and says how it ended."""
    random = Random(f"{seed}:{number}")
    path, original, done = odd_folders.write_odd(random, bases, home)
    out = home / "out"
    out.mkdir()
    words = words_of(random, path, original, out / "model.gguf")
    result = Result(number, "", done=[*done, " ".join(words[3:])])
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = cli.main(words)
        result.kind = CONVERTED if code == 0 else f"exit code {code}"
    except PyllamaernieError as error:
        result.kind, result.text = _judged(error), f"{type(error).__name__}: {error}"
    except MemoryError:
        result.kind, result.text = "out of memory", traceback.format_exc(limit=-4)
    except BaseException as error:
        result.kind, result.text = f"traceback, {type(error).__name__}", traceback.format_exc(limit=-4)
    result.seconds = time.monotonic() - started
    left = sorted(p.name for p in out.iterdir())
    if result.kind == REFUSED and left:
        result.kind, result.text = "files left behind", f"{left} after {result.text}"
    elif result.kind == CONVERTED:
        for name in left:
            try:
                read_gguf(out / name)
            except Exception as error:
                result.kind, result.text = "unreadable output", f"{name}: {error!r}"
    return result


def _judged(error: PyllamaernieError) -> str:
    text = str(error)
    if error.exit_code not in _EXIT_CODES:
        return "exit code of an error"
    if len(text) > 3000 or len(text.splitlines()) != 1:
        return "no message of one line"
    return REFUSED


def run_limited(seed: int, numbers: list[int], bases: Path, home: Path, jobs: int) -> list[Result]:
    """Each folder in a process of its own, some at a time."""
    results: list[Result] = []
    left, running = list(reversed(numbers)), {}
    while left or running:
        while left and len(running) < jobs:
            number = left.pop()
            place = home / str(number)
            place.mkdir()
            running[_start(seed, number, bases, place)] = (number, place, time.monotonic())
        for pid, (number, place, started) in list(running.items()):
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            seconds = time.monotonic() - started
            if not ended and seconds > SECONDS + 2:  # of which two to make the folder
                os.kill(pid, signal.SIGKILL)
                ended, _, usage = os.wait4(pid, 0)
                status = -1
            if ended:
                del running[pid]
                results.append(_result(number, place, status, usage.ru_maxrss * 1024, seconds))
                shutil.rmtree(place)
        time.sleep(0.005)
    return results


def _start(seed: int, number: int, bases: Path, place: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        result = convert(seed, number, bases, place, limited=True)
        (place / "result.json").write_text(json.dumps(vars(result)))
        code = 0
    finally:
        os._exit(code)


def _result(number: int, place: Path, status: int, memory: int, seconds: float) -> Result:
    path = place / "result.json"
    if status == -1:
        result = Result(number, "hang", f"more than {SECONDS} s")
    elif os.WIFSIGNALED(status):
        result = Result(number, f"signal {signal.Signals(os.WTERMSIG(status)).name}")
    elif path.is_file() and path.stat().st_size:
        result = Result(**json.loads(path.read_text()))
    else:
        result = Result(number, "no result")
    result.memory, result.seconds = memory, result.seconds or seconds
    return result


def report(results: list[Result], seed: int) -> str:
    """The counts, and the first few of each kind that is not fine."""
    kinds = Counter(result.kind for result in results)
    lines = [f"{n:6} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (item[0] not in FINE, item[0]))]
    refused = Counter(result.text.split(":", 1)[0] for result in results if result.kind == REFUSED)
    lines.append("refused as " + ", ".join(f"{name} {n}" for name, n in sorted(refused.items())))
    lines.append(
        f"longest {max(r.seconds for r in results):.1f} s, largest {max(r.memory for r in results) / 2**20:.0f} MiB"
    )
    for kind in sorted(set(kinds) - set(FINE)):
        for result in [r for r in results if r.kind == kind][:3]:
            again = f"python tests/fuzz/folders.py --seed {seed} --only {result.number}"
            lines += ["", f"{kind}: {again}", f"  {'; '.join(result.done)}", f"  {result.text.strip()[-1500:]}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folders", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time")
    parser.add_argument("--only", type=int, help="this one alone, with what was done and said")
    parser.add_argument("--keep", type=Path, help="with --only: where the folder is made and stays")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pyllamaernie-fuzz-") as temporary:
        bases, home = Path(temporary) / "bases", Path(temporary) / "odd"
        odd_folders.write_bases(bases)
        home.mkdir()
        if args.only is not None:
            if args.keep:
                shutil.copytree(bases, args.keep / "bases")
                bases, home = args.keep / "bases", args.keep
            result = convert(args.seed, args.only, bases, home)
            print(f"{result.kind} after {result.seconds:.2f} s", *result.done, result.text, sep="\n")
            return 0 if result.kind in FINE else 1
        results = run_limited(args.seed, list(range(args.folders)), bases, home, args.jobs)
    print(report(results, args.seed))
    return 0 if all(result.kind in FINE for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
