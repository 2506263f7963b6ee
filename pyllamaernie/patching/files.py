"""Patch files and the list of them: read and judge.

A small subset of git's format on purpose: text hunks, new files, deleted files. Renames, modes and binary hunks are
refused. Not the applying: that is `applying.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from pyllamaernie.errors import PatchError

SIZE_MAX_BYTES = 10 * 1024
SUBJECT_MAX = 72
N_CONTEXT = 3
KINDS = ("hook", "fix", "feat")  # the first word of a file name and of a Subject
GROUPS = ("backports", "fixes", "hooks", "feats")  # order in `series`
NAME = re.compile(r"(hook|fix|feat)(-[a-z0-9_.]+){2,}\.patch")
SUBJECT = re.compile(r"(\w+): ([\w./+-]+): (\S.*)")
HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
STATUS = re.compile(r"Pending( \[.+\])?|Backport \[[0-9a-f]{7,40}\b.*\]|Denied \[.+\]|Inappropriate \[.+\]")
STATUS_ALLOWED = "Pending, Backport [commit], Denied [url], Inappropriate [reason]"
FIELDS = ("Why", "Upstream-Status", "Drop-when")
ZERO_FROM = "From " + "0" * 40 + " Mon Sep 17 00:00:00 2001"


@dataclass(frozen=True)
class Hunk:
    """One hunk: `lines` are (operation, text) with operation one of b" +-"; `start` is the first old line, counted
    from 1."""

    at: int  # line in the patch file
    start: int
    lines: tuple[tuple[bytes, bytes], ...]

    @property
    def old(self) -> list[bytes]:
        return [text for op, text in self.lines if op != b"+"]

    @property
    def new(self) -> list[bytes]:
        return [text for op, text in self.lines if op != b"-"]


@dataclass(frozen=True)
class FileDiff:
    """The hunks of one file; `mode` is None unless the file is created."""

    path: str
    hunks: tuple[Hunk, ...]
    mode: str | None = None
    deleted: bool = False


@dataclass(frozen=True)
class Patch:
    """One patch file, parsed; `header` is everything above the diff."""

    name: str
    data: bytes
    header: str
    diffs: tuple[FileDiff, ...]
    has_signature: bool = False
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.name.partition("-")[0]

    @property
    def status(self) -> str:
        return self.fields.get("Upstream-Status", "")

    @property
    def is_backport(self) -> bool:
        return self.kind == "fix" and self.status.startswith("Backport")

    @property
    def group(self) -> str:
        return {"fix": "backports" if self.is_backport else "fixes", "hook": "hooks", "feat": "feats"}.get(
            self.kind, "feats"
        )


def header_fields(header: str) -> dict[str, str]:
    """From, Date, Subject and our own fields; a field runs on to the next field or blank line."""
    out: dict[str, str] = {}
    current = None
    for line in header.split("\n---\n")[0].splitlines():
        match = re.match(r"([A-Z][A-Za-z-]*): ?(.*)", line)
        if match and match[1] in ("From", "Date", "Subject", *FIELDS):
            current = match[1]
            if current in out:
                out[current] += "\n" + match[2]  # named twice: `problems` says so
            else:
                out[current] = match[2].strip()
        elif not line.strip():
            current = None
        elif current:
            out[current] += " " + line.strip()
    return out


def parse_patch(name: str, data: bytes) -> Patch:
    """The parsed patch.

    Raises: PatchError with the file and line where it is not in the form we accept.
    """

    def bad(at: int, text: str) -> PatchError:
        return PatchError(f"patches/{name}:{at + 1}: {text}")

    lines = data.split(b"\n")
    if lines and lines[-1] == b"":
        lines.pop()
    i = next((k for k, line in enumerate(lines) if line.startswith(b"diff --git ")), len(lines))
    header = b"\n".join(lines[:i]).decode("utf-8", "replace") + "\n"
    diffs, has_signature = [], False
    while i < len(lines):
        if lines[i] == b"-- ":
            has_signature = True
            break
        diff, i = parse_diff(lines, i, bad)
        diffs.append(diff)
    return Patch(name, data, header, tuple(diffs), has_signature, header_fields(header))


def parse_diff(lines: list[bytes], i: int, bad: Callable[[int, str], PatchError]) -> tuple[FileDiff, int]:
    """The hunks of one file, whose `diff --git` line is `lines[i]`, and the index after them."""
    match = re.fullmatch(rb"diff --git a/(\S+) b/(\S+)", lines[i])
    if not match:
        raise bad(i, f"expected 'diff --git a/PATH b/PATH', found {lines[i][:60]!r}")
    if match[1] != match[2]:
        raise bad(i, "renames are refused")
    path = match[1].decode()
    if path.startswith("/") or ".." in path.split("/"):
        raise bad(i, f"{path!r} leaves the tree")
    i += 1
    mode, deleted = None, False
    while i < len(lines) and not lines[i].startswith((b"--- ", b"diff --git ")):
        if lines[i].startswith(b"new file mode "):
            mode = lines[i][14:].decode()
            if mode not in ("100644", "100755"):
                raise bad(i, f"mode {mode} is refused")
        elif lines[i].startswith(b"deleted file mode "):
            deleted = True
        elif lines[i] == b"-- ":
            break
        elif not lines[i].startswith(b"index "):
            raise bad(
                i,
                f"{lines[i][:40].decode('utf-8', 'replace')!r}: only text hunks, new files and deleted files "
                f"are accepted",
            )
        i += 1
    expected = (
        b"--- " + (b"/dev/null" if mode else b"a/" + match[1]),
        b"+++ " + (b"/dev/null" if deleted else b"b/" + match[1]),
    )
    if tuple(lines[i : i + 2]) != expected:
        raise bad(
            min(i, len(lines) - 1),
            f"{path} has no hunks, or its '---' and '+++' lines are not {expected[0].decode()!r} and "
            f"{expected[1].decode()!r}",
        )
    i += 2
    hunks = []
    while i < len(lines) and lines[i].startswith(b"@@ "):
        hunk, i = parse_hunk(lines, i, bad)
        hunks.append(hunk)
    if not hunks:
        raise bad(i - 1, f"{path} has no hunks")
    return FileDiff(path, tuple(hunks), mode, deleted), i


def parse_hunk(lines: list[bytes], i: int, bad: Callable[[int, str], PatchError]) -> tuple[Hunk, int]:
    """The hunk whose `@@` line is `lines[i]`, and the index after it."""
    at, match = i, HUNK.match(lines[i])
    if not match:
        raise bad(i, f"bad hunk line {lines[i][:60]!r}")
    n_old, n_new = (int(match[k]) if match[k] is not None else 1 for k in (2, 4))
    body: list[tuple[bytes, bytes]] = []
    i += 1
    while n_old > 0 or n_new > 0:
        if i >= len(lines) or lines[i][:1] not in (b" ", b"+", b"-", b"\\"):
            raise bad(
                min(i, len(lines) - 1),
                f"the hunk of line {at + 1} ends before its count: {n_old} old and {n_new} new lines are missing",
            )
        op, text = lines[i][:1], lines[i][1:]
        if op == b"\\":
            body[-1] = (body[-1][0], body[-1][1].removesuffix(b"\n"))
        else:
            body.append((op, text + b"\n"))
            n_old -= op != b"+"
            n_new -= op != b"-"
        i += 1
    if n_old or n_new:
        raise bad(at, "the hunk's counts do not agree with its lines")
    if i < len(lines) and lines[i].startswith(b"\\") and body:
        body[-1] = (body[-1][0], body[-1][1].removesuffix(b"\n"))
        i += 1
    return Hunk(at + 1, int(match[1]), tuple(body)), i


def problems(patch: Patch) -> list[str]:
    """What is wrong with the patch by itself, one sentence each; empty when it may stand in the series."""
    out = []
    fields, subject = patch.fields, SUBJECT.fullmatch(patch.fields.get("Subject", "").removeprefix("[PATCH] "))
    head = patch.header.splitlines()
    if not NAME.fullmatch(patch.name):
        out.append("the name is not <kind>-<area>-<what>.patch with kind hook, fix or feat, in lower case")
    if not head or head[0] != ZERO_FROM:
        out.append(f"the first line is not {ZERO_FROM!r} (git format-patch --zero-commit)")
    out += [f"the header has no {name}: line" for name in ("From", "Date", *FIELDS) if not fields.get(name)]
    out += [f"the header names {name}: twice" for name, value in fields.items() if "\n" in value]
    if not patch.header.isascii():
        out.append("the header has characters outside ASCII")
    if not subject:
        out.append(f"Subject: {fields.get('Subject', '')!r} is not 'kind: area: what'")
    else:
        if subject[1] != patch.kind:
            out.append(f"Subject: begins with {subject[1]!r}, the file name with {patch.kind!r}")
        area = re.sub(r"[^a-z0-9_.]+", "-", subject[2].lower()).strip("-")
        if not patch.name.startswith(f"{patch.kind}-{area}"):
            out.append(f"Subject: names the area {subject[2]!r}, the file name does not")
        if len(subject[0]) > SUBJECT_MAX:
            out.append(f"Subject: has {len(subject[0])} characters, at most {SUBJECT_MAX} are allowed")
    if patch.status.startswith("Submitted"):
        out.append("Upstream-Status: Submitted is refused: this project sends nothing upstream")
    elif patch.status and not STATUS.fullmatch(patch.status):
        out.append(f"Upstream-Status: {patch.status!r} is not one of {STATUS_ALLOWED}")
    if patch.has_signature:
        out.append("it ends with a signature (git format-patch --no-signature)")
    if patch.header.partition("\n---\n")[2].strip():
        out.append("it has a diffstat (git format-patch --no-stat)")
    if len(patch.data) > SIZE_MAX_BYTES and not patch.is_backport:
        out.append(f"it has {len(patch.data)} bytes, at most {SIZE_MAX_BYTES} are allowed")
    if not patch.diffs:
        out.append("it changes nothing")
    if len({d.path for d in patch.diffs}) != len(patch.diffs):
        out.append("it names a file twice")
    if not patch.is_backport:
        out += [problem for diff in patch.diffs for problem in diff_problems(patch.kind, diff)]
    return out


def diff_problems(kind: str, diff: FileDiff) -> list[str]:
    """What is wrong with the hunks of one file."""
    out = []
    if diff.mode:
        out.append(f"{diff.path}: a new file belongs into native/overlay/")
    comment = (b"#",) if diff.path.endswith((".py", ".txt", ".cmake", ".sh")) else (b"//", b"/*")
    for hunk in diff.hunks:
        added = [text for op, text in hunk.lines if op == b"+"]
        removed = [text for op, text in hunk.lines if op == b"-"]
        where = f"{diff.path} (patch line {hunk.at})"
        if kind == "hook" and removed:
            out.append(
                f"{where}: a hook only adds lines, this one removes {removed[0].strip().decode('utf-8', 'replace')!r}"
            )
        if kind == "hook" and any(text.strip().startswith(comment) for text in added):
            out.append(f"{where}: a hook adds no comments")
        if any(text.rstrip(b"\n") != text.rstrip() for text in added):
            out.append(f"{where}: white space at the end of an added line")
        solid = {re.sub(rb"\s+", b"", text): text for text in removed if text.strip()}
        if any(solid.get(re.sub(rb"\s+", b"", text), text) != text for text in added):
            out.append(f"{where}: a change of white space only")
    return out


def read_series(root: Path) -> tuple[list[Patch], list[str]]:
    """The patches in order, and what is wrong with the list: missing, unlisted, named twice, unreadable, out of
    order."""
    folder = root / "patches"
    try:
        text = (folder / "series").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PatchError(f"{folder / 'series'}: the series is missing") from None
    names = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    out, wrong = [], []
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            wrong.append(f"patches/series names {name} {names.count(name)} times")
        if "/" in name or not name.endswith(".patch") or len(name.split()) > 1:
            wrong.append(f"patches/series: {name!r} is not the name of a patch")
            continue
        try:
            out.append(parse_patch(name, (folder / name).read_bytes()))
        except FileNotFoundError:
            wrong.append(f"patches/{name} is listed in patches/series but missing")
        except PatchError as e:
            wrong.append(str(e))
    for path in sorted(folder.iterdir()):
        if path.name not in names and path.name != "series" and not path.name.startswith("."):
            wrong.append(f"patches/{path.name} is not listed in patches/series")
    for before, after in pairwise(out):
        if GROUPS.index(before.group) > GROUPS.index(after.group):
            wrong.append(
                f"patches/series: {after.name} ({after.group}) stands after {before.name} ({before.group}); the "
                f"order is {', '.join(GROUPS)}"
            )
    return out, wrong


def load_series(root: Path) -> list[Patch]:
    """The patches in order.

    Raises: PatchError when anything is wrong with the list.
    """
    series, wrong = read_series(root)
    if wrong:
        raise PatchError("; ".join(wrong))
    return series


def series_text(patches: list[Patch]) -> str:
    """The text of `series`: one `#` line heads each group."""
    out, group = [], ""
    for patch in patches:
        if patch.group != group:
            group = patch.group
            out.append(f"# {group}")
        out.append(patch.name)
    return "".join(f"{line}\n" for line in out)


def series_digest(series: list[Patch]) -> str:
    """sha256 over the names and contents of the patches, in order."""
    rows = "".join(f"{hashlib.sha256(p.data).hexdigest()} {p.name}\n" for p in series)
    return hashlib.sha256(rows.encode()).hexdigest()
