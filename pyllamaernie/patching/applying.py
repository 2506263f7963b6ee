"""Patches applied to lines of text, in memory: no fuzz, and an offset only where one place fits.

What `files.py` reads is applied here, and gives the bytes that git gives. Not the writing: that is `tree.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyllamaernie.errors import PatchError
from pyllamaernie.patching.files import N_CONTEXT, FileDiff, Hunk, Patch


@dataclass(frozen=True)
class Moved:
    """A hunk that fits, but not at the line that it states."""

    patch: str
    path: str
    line: int
    offset: int

    def __str__(self) -> str:
        return f"patches/{self.patch}:{self.line}: applies to {self.path} {self.offset:+d} lines away"


def split_lines(data: bytes) -> list[bytes]:
    """Lines with their line feeds; a carriage return is an ordinary byte."""
    lines = data.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def fits(text: list[bytes], hunk: Hunk, pos: int) -> bool:
    """Whether the hunk's old lines stand at `pos`; with less than full context only at the matching end of the file."""
    old = hunk.old
    if pos < 0 or text[pos : pos + len(old)] != old:
        return False
    ops = [op for op, _ in hunk.lines]
    lead = next((i for i, op in enumerate(ops) if op != b" "), len(ops))
    trail = next((i for i, op in enumerate(reversed(ops)) if op != b" "), len(ops))
    return (lead >= N_CONTEXT or pos == 0) and (trail >= N_CONTEXT or pos + len(old) == len(text))


def patch_lines(text: list[bytes], patch: Patch, diff: FileDiff) -> tuple[list[bytes], list[Moved], list[str]]:
    """The patched lines, the hunks that were not where they said, and a sentence for each hunk that does not apply.

    A hunk must fit exactly: at its line (moved by what earlier hunks of the file were moved), else at one other place
    and no more.
    """
    out: list[bytes] = []
    moved, wrong, done, drift = [], [], 0, 0
    for hunk in diff.hunks:
        home = hunk.start - 1 if hunk.old else hunk.start
        pos = home + drift
        if pos < done or not fits(text, hunk, pos):
            places = [k for k in range(done, len(text) - len(hunk.old) + 1) if fits(text, hunk, k)]
            if len(places) != 1:
                why = why_not(text, hunk, pos, places)
                wrong.append(
                    f"patches/{patch.name}:{hunk.at}: does not apply to {diff.path} at line {hunk.start}: {why}"
                )
                continue
            pos = places[0]
            drift = pos - home
        if pos != home:
            moved.append(Moved(patch.name, diff.path, hunk.at, pos - home))
        out += text[done:pos] + hunk.new
        done = pos + len(hunk.old)
    return out + text[done:], moved, wrong


def why_not(text: list[bytes], hunk: Hunk, stated: int, places: list[int]) -> str:
    """One phrase: several places fit, the change is already there, or the first line that differs where most agree."""

    def shown(line: bytes) -> str:
        return repr(line.rstrip(b"\n").decode("utf-8", "replace")[:80])

    if places:
        return f"its context fits {len(places)} places (lines {', '.join(str(p + 1) for p in places[:4])})"
    old, new = hunk.old, hunk.new
    if any(text[k : k + len(new)] == new for k in range(len(text) - len(new) + 1)):
        return "the change is already there"
    if any(text[k : k + len(old)] == old for k in range(len(text) - len(old) + 1)):
        return f"it has less than {N_CONTEXT} lines of context and is not at an end of the file"

    def agreement(k: int) -> tuple[int, int]:
        return sum(a == b for a, b in zip(old, text[k : k + len(old)], strict=False)), -abs(k - stated)

    best = max(range(len(text) or 1), key=agreement)
    for k, line in enumerate(old):
        if best + k >= len(text):
            return f"expected {shown(line)} at line {best + k + 1}, found the end of the file"
        if text[best + k] != line:
            found = shown(text[best + k])
            return f"expected {shown(line)} at line {best + k + 1}, found {found}, and the context stands nowhere else"
    raise AssertionError("the context was said not to be there")


def apply_patch(read: Callable[[str], bytes | None], patch: Patch) -> tuple[dict[str, bytes | None], list[Moved]]:
    """The files that the patch changes, with their new bytes (None: deleted), and its moved hunks.

    Raises: PatchError with one sentence per defect; then nothing of the patch counts.
    """
    changed: dict[str, bytes | None] = {}
    moved: list[Moved] = []
    wrong = [] if patch.diffs else [f"patches/{patch.name}: changes nothing"]
    for diff in patch.diffs:
        before = changed[diff.path] if diff.path in changed else read(diff.path)
        if diff.mode and before is not None:
            wrong.append(f"patches/{patch.name}: creates {diff.path}, which is already there")
            continue
        if before is None and not diff.mode:
            wrong.append(f"patches/{patch.name}:{diff.hunks[0].at}: changes {diff.path}, which is not in the tree")
            continue
        lines, notes, bad = patch_lines(split_lines(before or b""), patch, diff)
        moved += notes
        wrong += bad
        if diff.deleted and lines and not bad:
            wrong.append(f"patches/{patch.name}: deletes {diff.path}, but {len(lines)} lines would remain")
        changed[diff.path] = None if diff.deleted else b"".join(lines)
    if wrong:
        raise PatchError(*wrong)
    return changed, moved
