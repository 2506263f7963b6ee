"""The patched tree: what it must become, written into a build folder or into a git tree for editing, and exported
from there.

Upstream is never edited: the pinned tree is copied, the series applied to the copy in memory, `native/overlay/` laid
over it, and only files whose bytes differ are written, so that a rebuild compiles what changed. Not the command line:
that is `patches.py`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

if __package__:
    from .patch_files import (
        GROUPS,
        SUBJECT,
        Moved,
        Patch,
        apply_patch,
        load_series,
        parse_patch,
        problems,
        series_digest,
    )
    from .patch_source import PatchError, Tree, fetch, load_pin, scan_files, slow_notice
else:
    from patch_files import (
        GROUPS,
        SUBJECT,
        Moved,
        Patch,
        apply_patch,
        load_series,
        parse_patch,
        problems,
        series_digest,
    )
    from patch_source import PatchError, Tree, fetch, load_pin, scan_files, slow_notice

log = logging.getLogger("pyllamaernie.patches")

STAMP = ".pyllamaernie-stamp.json"
OVERLAY = "native/overlay"
BASE = "pyllamaernie-base"  # tag of the pristine commit in an editing tree
TRAILER = "Patch-Filename: "  # last line of a commit message there; not exported


def overlay_files(root: Path) -> dict[str, bytes]:
    """Path and bytes of every file in `native/overlay/`.

    Raises: PatchError when the folder is missing or holds a link.
    """
    folder = root / OVERLAY
    if not folder.is_dir():
        raise PatchError(f"{folder}: the overlay is missing")
    out = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if "__pycache__" in inner.parts or path.name.startswith("."):
            continue
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise PatchError(f"{path}: a link or special file; only plain files are allowed in the overlay")
        if path.is_file():
            out[inner.as_posix()] = path.read_bytes()
    return out


# ---- what the tree must become ----


@dataclass(frozen=True)
class Plan:
    """The result of the series and the overlay, before a byte is written."""

    tree: Tree
    series: list[Patch]
    changed: dict[str, bytes | None]  # by the series; None: deleted
    modes: dict[str, str]  # of files that the series creates
    overlay: dict[str, bytes]
    moved: list[Moved]

    def stamp(self, root: Path) -> dict:
        """What the stamp file says when the tree is complete."""
        created = sorted({*self.overlay, *(p for p in self.changed if p not in self.tree.files)})
        return {**identity(root, self.series, self.overlay), "files_added": created}


def identity(root: Path, series: list[Patch], overlay: Mapping[str, bytes]) -> dict:
    """Pin, commit and digests: what names a build."""
    pin = load_pin(root)
    rows = "".join(f"{hashlib.sha256(data).hexdigest()} {name}\n" for name, data in sorted(overlay.items()))
    return {
        "commit": pin.commit,
        "build_number": pin.build_number,
        "upstream_version": pin.upstream_version,
        "source": f"{pin.package}=={pin.version}",
        "archive_sha256": pin.archive_sha256,
        "tree_sha256": pin.tree_sha256,
        "digest": series_digest(series),
        "overlay_sha256": hashlib.sha256(rows.encode()).hexdigest(),
    }


def reader(tree: Tree, changed: Mapping[str, bytes | None]) -> Callable[[str], bytes | None]:
    """A function that gives the bytes of a path, as changed so far, or None."""

    def read(path: str) -> bytes | None:
        if path in changed:
            return changed[path]
        return (tree.path / path).read_bytes() if path in tree.files else None

    return read


def make_plan(root: Path, tree: Tree) -> Plan:
    """The series applied to `tree` in memory, and the overlay checked against it.

    Raises: PatchError on the first defect.
    """
    series, changed, modes, moved = load_series(root), {}, {}, []
    for patch in series:
        new, notes = apply_patch(reader(tree, changed), patch)
        changed.update(new)
        modes.update({d.path: d.mode for d in patch.diffs if d.mode})
        moved += notes
    overlay = overlay_files(root)
    if clash := overlay_clash(tree, changed, overlay):
        raise PatchError(clash)
    return Plan(tree, series, changed, modes, overlay, moved)


def overlay_clash(tree: Tree, changed: Mapping[str, bytes | None], overlay: Mapping[str, bytes]) -> str:
    """A sentence when an overlay path is already upstream's, as a file or as a folder; else empty."""
    taken = {*tree.files, *changed}
    folders = {"/".join(p.split("/")[:k]) for p in taken for k in range(1, p.count("/") + 1)}
    clash = [
        p
        for p in overlay
        if p in taken or p in folders or any("/".join(p.split("/")[:k]) in taken for k in range(1, p.count("/") + 1))
    ]
    return f"{OVERLAY}: {', '.join(clash)} exists upstream; the overlay may only hold new files" if clash else ""


# ---- apply ----


def write_if_other(path: Path, data: Callable[[], bytes], digest: str, mode: str) -> bool:
    """Makes `path` hold these bytes with this mode; a file that does already keeps its time. True when it was
    written."""
    executable = mode == "100755"
    try:
        same = hashlib.sha256(path.read_bytes()).hexdigest() == digest and not path.is_symlink()
    except OSError:
        same = False
    if same:
        if bool(path.stat().st_mode & 0o100) != executable:
            path.chmod(0o755 if executable else 0o644)
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data())
        part.chmod(0o755 if executable else 0o644)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return True


def read_stamp(folder: Path) -> dict | None:
    """The stamp of a tree that we made; None when there is no such tree yet.

    Raises: PatchError when the folder is something else, so that nothing foreign is overwritten.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if (folder / ".git").exists():
        raise PatchError(
            f"{folder} is a git tree: export what you edited there, or delete it, or choose another folder"
        )
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PatchError(
            f"{folder} is not empty and was not made by this tool (it has no {STAMP}); choose another folder"
        ) from None


def write_tree(plan: Plan, folder: Path, stamp: dict, old: dict | None) -> tuple[int, int]:
    """Brings `folder` to what the plan says; gives back how many files were written and removed."""
    folder.mkdir(parents=True, exist_ok=True)
    old_added = set((old or {}).get("files_added", ()))
    unfinished = {"unfinished": True, "files_added": sorted(old_added | set(stamp["files_added"]))}
    if old != stamp:
        (folder / STAMP).write_text(json.dumps(unfinished), encoding="utf-8")
    n_written = n_removed = 0
    tick = slow_notice(f"writing {folder}")
    for name, (mode, digest) in plan.tree.files.items():
        tick()
        if name not in plan.changed:
            n_written += write_if_other(folder / name, (plan.tree.path / name).read_bytes, digest, mode)
    for name, data in {**plan.changed, **plan.overlay}.items():
        if data is not None:
            mode = plan.modes.get(name) or plan.tree.files.get(name, ("100644",))[0]
            n_written += write_if_other(folder / name, lambda data=data: data, hashlib.sha256(data).hexdigest(), mode)
    gone = {name for name, data in plan.changed.items() if data is None} | (
        old_added - set(stamp["files_added"]) - set(plan.tree.files)
    )
    for name in sorted(gone):
        if (folder / name).exists():
            (folder / name).unlink()
            n_removed += 1
    if old != stamp:
        part = folder / f"{STAMP}.{os.getpid()}"
        part.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        os.replace(part, folder / STAMP)
    return n_written, n_removed


def apply(root: Path, into: Path, *, source: Path | None = None, git: bool = False) -> Plan:
    """Makes `into` the patched tree with the overlay in it; files that are right already keep their times.

    `source`: a pristine tree to use as it is; else the pinned one, fetched if need be. With `git`, `into` becomes a
    git tree with one commit per patch, for editing. Raises: PatchError, before anything is written unless the disk
    fails.
    """
    tree = fetch(root) if source is None else Tree(source, scan_files(source), "given")
    if git:
        return apply_git(root, into, tree)
    old = read_stamp(into)
    plan = make_plan(root, tree)
    n_written, n_removed = write_tree(plan, into, plan.stamp(root), old)
    log.info(
        "%s: %d patches and %d overlay files on llama.cpp %s, %d files written, %d removed",
        into,
        len(plan.series),
        len(plan.overlay),
        load_pin(root).commit[:12],
        n_written,
        n_removed,
    )
    for note in plan.moved:
        log.warning("%s; re-export the series", note)
    return plan


# ---- editing in git ----


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


def apply_git(root: Path, into: Path, tree: Tree) -> Plan:
    """`apply`, as a git tree with one commit per patch and the overlay present but ignored."""
    if into.exists() and any(into.iterdir()):
        raise PatchError(f"{into} is not empty; an editing tree starts in a new folder")
    series, changed, moved = load_series(root), {}, []
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
    git(into, "commit", "-q", "-m", f"llama.cpp {load_pin(root).commit}", env=base)
    git(into, "tag", BASE)
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
                write_if_other(into / name, lambda data=data: data, hashlib.sha256(data).hexdigest(), mode)
        if new:
            git(into, "add", "-A", "-f", "--", *new)
        message, env = commit_message(patch)
        git(into, "commit", "-q", "--allow-empty", "--cleanup=verbatim", "-F", "-", env=env, data=message.encode())
    overlay = overlay_files(root)
    if clash := overlay_clash(tree, changed, overlay):
        raise PatchError(clash)
    for name, data in overlay.items():
        write_if_other(into / name, lambda data=data: data, hashlib.sha256(data).hexdigest(), "100644")
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


def series_text(patches: list[Patch]) -> str:
    """The text of `series`: one `#` line heads each group."""
    out, group = [], ""
    for patch in patches:
        if patch.group != group:
            group = patch.group
            out.append(f"# {group}")
        out.append(patch.name)
    return "".join(f"{line}\n" for line in out)
