"""A git tree with one commit per patch: made from the series for editing, and exported to it again.

Not the tree that is built: that is `tree.py`. Needs git, which the build does not.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from pyllamaernie.errors import PatchError
from pyllamaernie.patching.applying import Moved, apply_patch
from pyllamaernie.patching.files import GROUPS, SUBJECT, Patch, load_series, parse_patch, problems, series_text
from pyllamaernie.patching.listing import Tree
from pyllamaernie.patching.source import load_pin
from pyllamaernie.patching.tree import (
    OVERLAY,
    Plan,
    overlay_clash,
    overlay_files,
    pristine,
    reader,
    write_bytes,
    write_if_other,
)

log = logging.getLogger("pyllamaernie.patches")

BASE = "pyllamaernie-base"  # tag of the pristine commit
TRAILER = "Patch-Filename: "  # last line of a commit message; not exported


def git(folder: Path, *args: str, env: Mapping[str, str] | None = None, data: bytes | None = None) -> bytes:
    """The output of a git command in `folder`, with no configuration but our own.

    Raises: PatchError with git's last line.
    """
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    clean |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C", **(env or {})}
    try:
        done = subprocess.run(
            ["git", "-c", "core.autocrlf=false", *args], cwd=folder, env=clean, input=data or b"", capture_output=True
        )
    except FileNotFoundError:
        raise PatchError("git is not installed; only editing and exporting patches needs it") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        raise PatchError(f"git {args[0]} failed in {folder}: {said[-1]}")
    return done.stdout


def commit_message(patch: Patch) -> tuple[str, dict[str, str]]:
    """The commit message that exports to this patch's header, and the author that git is to record."""
    body = patch.header.split("\n---\n")[0].partition("\n\n")[2].strip("\n")
    author = re.fullmatch(r"(.+?) <(.*)>", patch.fields.get("From", ""))
    if not author or not patch.fields.get("Date"):
        raise PatchError(f"patches/{patch.name}: From: and Date: are needed to make a commit of it")
    env = {"GIT_AUTHOR_NAME": author[1], "GIT_AUTHOR_EMAIL": author[2], "GIT_AUTHOR_DATE": patch.fields["Date"]}
    env |= {k.replace("AUTHOR", "COMMITTER"): v for k, v in env.items()}
    return f"{patch.fields.get('Subject', '').removeprefix('[PATCH] ')}\n\n{body}\n{TRAILER}{patch.name}\n", env


def commit_pristine(into: Path, tree: Tree, commit: str) -> None:
    """Makes `into` a git tree whose first commit, tagged `BASE`, is upstream's `commit`."""
    into.mkdir(parents=True, exist_ok=True)
    git(into, "init", "-q", "-b", "patches")
    for key, value in {
        "gc.auto": "0",
        "core.autocrlf": "false",
        "core.fileMode": "true",
        "commit.gpgSign": "false",
        "rebase.autoSquash": "true",
    }.items():
        git(into, "config", key, value)
    for name, (mode, digest) in tree.files.items():
        write_if_other(into / name, (tree.path / name).read_bytes, digest, mode)
    base = {
        "GIT_AUTHOR_NAME": "pyllamaernie",
        "GIT_AUTHOR_EMAIL": "patches@pyllamaernie",
        "GIT_AUTHOR_DATE": "2000-01-01T00:00:00Z",
    }
    base |= {k.replace("AUTHOR", "COMMITTER"): v for k, v in base.items()}
    git(into, "add", "-A", "-f")
    git(into, "commit", "-q", "-m", f"llama.cpp {commit}", env=base)
    git(into, "tag", BASE)


def apply_git(root: Path, into: Path, *, source: Path | None = None) -> Plan:
    """`apply`, as a git tree with one commit per patch and the overlay present but ignored.

    Raises: PatchError; then `into` may be left unfinished.
    """
    tree = pristine(root, source)
    if into.exists() and any(into.iterdir()):
        raise PatchError(f"{into} is not empty; an editing tree starts in a new folder")
    series = load_series(root)
    changed: dict[str, bytes | None] = {}
    moved: list[Moved] = []
    commit_pristine(into, tree, load_pin(root).commit)
    for patch in series:
        new, notes = apply_patch(reader(tree, changed), patch) if patch.diffs else ({}, [])
        changed.update(new)
        moved += notes
        modes = {d.path: d.mode for d in patch.diffs if d.mode}
        for name, data in new.items():
            if data is None:
                (into / name).unlink()
            else:
                mode = modes.get(name) or tree.files.get(name, ("100644",))[0]
                write_bytes(into / name, data, mode)
        if new:
            git(into, "add", "-A", "-f", "--", *new)
        message, env = commit_message(patch)
        git(into, "commit", "-q", "--allow-empty", "--cleanup=verbatim", "-F", "-", env=env, data=message.encode())
    overlay = overlay_files(root)
    if clash := overlay_clash(tree, changed, overlay):
        raise PatchError(clash)
    for name, data in overlay.items():
        write_bytes(into / name, data, "100644")
    (into / ".git/info").mkdir(exist_ok=True)
    (into / ".git/info/exclude").write_text("".join(f"/{name}\n" for name in sorted(overlay)) + "/build/\n")
    log.info(
        "%s: %d commits on %s; the overlay lies there as a copy: edit it in %s, not here",
        into,
        len(series),
        BASE,
        root / OVERLAY,
    )
    return Plan(tree, series, changed, {}, overlay, moved)


def export(root: Path, tree: Path) -> list[str]:
    """Rewrites `patches/` from the commits of an editing tree; gives back what changed, one phrase per file.

    Raises: PatchError for an unclean tree, merges, fixup commits, names used twice, or a patch that `problems` refuses.
    """
    if not (tree / ".git").exists():
        raise PatchError(f"{tree} is not a git tree made by 'apply --git'")
    # upstream's own .gitignore may bring back what info/exclude leaves out: the overlay's files, no part of any patch
    ours = set((tree / ".git/info/exclude").read_text(encoding="utf-8").splitlines())
    changed = git(tree, "status", "--porcelain").decode().splitlines()
    if dirty := [line[3:] for line in changed if f"/{line[3:]}" not in ours]:
        raise PatchError(f"{tree}: {len(dirty)} files are not committed, the first is {dirty[0]}")
    commits = git(tree, "rev-list", "--reverse", "--parents", f"{BASE}..HEAD").decode().splitlines()
    patches: list[Patch] = []
    for line in commits:
        commit, *parents = line.split()
        title = git(tree, "log", "-1", "--format=%s", commit).decode().strip()
        if len(parents) != 1:
            raise PatchError(f"{tree}: {title!r} is a merge; the series is a straight line")
        if title.startswith(("fixup!", "squash!", "amend!")):
            raise PatchError(
                f"{tree}: {title!r} is not folded in yet: GIT_SEQUENCE_EDITOR=true git rebase -i --autosquash {BASE}"
            )
        patches.append(export_commit(tree, commit, title))
    names = [p.name for p in patches]
    wrong = [f"{n} is the name of {names.count(n)} commits" for n in dict.fromkeys(names) if names.count(n) > 1]
    wrong += [f"{p.name}: {text}" for p in patches for text in problems(p)]
    wrong += [
        f"{b.name} ({b.group}) stands after {a.name} ({a.group}); the order is {', '.join(GROUPS)}"
        for a, b in pairwise(patches)
        if GROUPS.index(a.group) > GROUPS.index(b.group)
    ]
    if wrong:
        raise PatchError("nothing exported: " + "; ".join(wrong))
    return write_series(root, patches)


def export_commit(tree: Path, commit: str, title: str) -> Patch:
    """One commit as a patch file, in the one form in which we keep them: no folded lines, no diffstat, no blob ids."""
    flags = ["--zero-commit", "--no-signature", "--no-stat", "--keep-subject", "--no-renames", "--no-ext-diff"]
    text = git(tree, "format-patch", "-1", "--stdout", *flags, "-U3", "--diff-algorithm=myers", commit)
    if not text:
        raise PatchError(f"{tree}: the commit {title!r} changes nothing")
    header, mark, diff = text.partition(b"\ndiff --git ")
    mail, _, body = header.partition(b"\n\n")
    lines = body.rstrip(b"\n").split(b"\n")
    named = [line for line in lines if line.startswith(TRAILER.encode())]
    body = b"\n".join(line for line in lines if line not in named)
    diff = re.sub(rb"(?m)^index [0-9a-f]+\.\.[0-9a-f]+( \d+)?\n", b"", diff)
    if named:
        name = named[-1].decode()[len(TRAILER) :].strip()
    else:
        match = SUBJECT.fullmatch(title)
        if not match:
            raise PatchError(
                f"{tree}: the commit {title!r} has neither a line '{TRAILER}NAME' nor a subject 'kind: area: what'"
            )
        name = re.sub(r"[^a-z0-9_.]+", "-", title.lower()).strip("-.")[:60].strip("-.") + ".patch"
    return parse_patch(name, mail.replace(b"\n ", b" ") + b"\n\n" + body + b"\n---" + mark + diff)


def write_series(root: Path, patches: list[Patch]) -> list[str]:
    """Writes the patch files and, if the order changed, `series`; removes files of patches that are gone."""
    folder, said = root / "patches", []
    folder.mkdir(exist_ok=True)
    old = [p.name for p in folder.glob("*.patch")]
    for patch in patches:
        path = folder / patch.name
        if not path.exists() or path.read_bytes() != patch.data:
            said.append(f"{'rewrote' if path.exists() else 'wrote'} patches/{patch.name}")
            path.write_bytes(patch.data)
    for name in sorted(set(old) - {p.name for p in patches}):
        (folder / name).unlink()
        said.append(f"removed patches/{name}")
    text = series_text(patches)
    listed = folder / "series"
    before = listed.read_text(encoding="utf-8") if listed.exists() else ""
    if [line.strip() for line in before.splitlines() if line.strip() and not line.startswith("#")] != [
        p.name for p in patches
    ]:
        listed.write_text(text, encoding="utf-8")
        said.append("rewrote patches/series")
    return said
