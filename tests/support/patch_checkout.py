"""A source checkout on a tiny upstream, for tests of the patch manager.

The upstream is made with git and packed like the real archive; two patches and one overlay file lie on it.

`upstream` and `root` are fixtures; a `conftest.py` imports them. git is the independent witness for tree ids, for
applying and for the commits of an editing tree.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pyllamaernie import cli

REPO = Path(__file__).resolve().parents[2]
GIT_ENV = {
    **{k: v for k, v in os.environ.items() if not k.startswith("GIT_")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    **{f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
       for what, value in (("NAME", "A Tester"), ("EMAIL", "a@test"), ("DATE", "2026-01-02T03:04:05+0000"))},
}  # fmt: skip

ARCH_H = "".join(f"    LLM_ARCH_{k},\n" for k in range(30))
FILES = {
    "include/llama.h": "int llama;\n",
    "ggml/include/ggml.h": "int ggml;\n",
    "src/arch.h": "enum llm_arch {\n" + ARCH_H + "};\n",
    "src/tile.cpp": "".join(f"line {k};\n" for k in range(40)),
    "src/twins.cpp": "same a\nsame b\nsame c\nhere\nsame d\nsame e\nsame f\n" * 3,
    "src/no-newline.txt": "one\ntwo\nthree\nfour",
    ".github/workflow.yml": "on: push\n",
    "run.sh": "#!/bin/sh\n",
}
HEADER = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: A Tester <a@test>
Date: Fri, 2 Jan 2026 03:04:05 +0000
Subject: {subject}

Why: {why}
Upstream-Status: {status}
Drop-when: never
---
"""


def git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, env=GIT_ENV, check=True, capture_output=True, text=True).stdout


def add_member(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tree/` (the git checkout), `pkg-1.tar.gz` and `pin.json`."""
    home = tmp_path_factory.mktemp("upstream")
    tree = home / "tree"
    for name, text in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "run.sh").chmod(0o755)
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "tiny upstream")
    commit, tree_id = git(tree, "rev-parse", "HEAD").strip(), git(tree, "rev-parse", "HEAD^{tree}").strip()
    archive = home / "pkg-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in FILES:
            add_member(tar, f"pkg-1/vendor/up/{name}", (tree / name).read_bytes(), 0o755 if name == "run.sh" else 0o644)
        add_member(tar, "pkg-1/vendor/up/.git", b"gitdir: elsewhere\n")
        add_member(tar, "pkg-1/setup.py", b"raise SystemExit\n")
        add_member(tar, "pkg-1/.git/modules/up/HEAD", f"{commit}\n".encode())
        loose = f"objects/{commit[:2]}/{commit[2:]}"
        add_member(tar, f"pkg-1/.git/modules/up/{loose}", (tree / ".git" / loose).read_bytes())
    rows = [
        (n, "100755" if n == "run.sh" else "100644", hashlib.sha256(t.encode()).hexdigest())
        for n, t in sorted(FILES.items())
    ]
    pin = {
        "commit": commit, "build_number": 7, "upstream_version": "0.0-test",
        "package": "pkg", "version": "1", "archive": archive.name, "archive_size_bytes": archive.stat().st_size,
        "archive_sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "folder": "pkg-1/vendor/up", "git_dir": "pkg-1/.git/modules/up", "tree": tree_id,
        "tree_sha256": hashlib.sha256("".join(f"{m} {d} {n}\n" for n, m, d in rows).encode()).hexdigest(),
    }  # fmt: skip
    (home / "pin.json").write_text(json.dumps(pin))
    return home


def without_ids(diff: str) -> str:
    return re.sub(r"(?m)^index .*\n", "", diff)


def diff_of(upstream: Path, edits: dict[str, tuple[str, str]], flags: tuple[str, ...] = ()) -> str:
    """What `git diff` says about replacing, in each file, one text by another; the checkout is left as it was."""
    tree = upstream / "tree"
    for name, (old, new) in edits.items():
        text = (tree / name).read_text()
        assert old in text
        (tree / name).write_text(text.replace(old, new, 1))
    out = git(tree, "diff", *flags)
    git(tree, "checkout", "-q", ".")
    return without_ids(out)


def make_patch(
    root: Path, name: str, diff: str, *, subject: str = "", why: str = "a test", status: str = "Inappropriate [a test]"
) -> Path:
    kind, area, *what = name.split("-")
    path = root / "patches" / f"{name}.patch"
    path.write_text(
        HEADER.format(subject=subject or f"{kind}: {area}: {' '.join(what)}", why=why, status=status) + diff
    )
    return path


HOOK = {"src/arch.h": ("    LLM_ARCH_12,\n", '    LLM_ARCH_12,\n#include "ours.inc"\n')}
FIX = {"src/tile.cpp": ("line 20;\n", "line 20;\nbarrier;\n")}


@pytest.fixture
def root(upstream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source checkout: pin, cached archive, two patches, one overlay file."""
    for name in ("LLAMA_CPP_DIR", "LLAMA_CPP_DIR_UNCHECKED", "PYLLAMAERNIE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no test may reach the network
    root = tmp_path / "checkout"
    for folder in ("vendor/cache", "patches", "native/overlay/src/models"):
        (root / folder).mkdir(parents=True)
    shutil.copy(upstream / "pin.json", root / "vendor/llama.cpp.json")
    shutil.copy(upstream / "pkg-1.tar.gz", root / "vendor/cache")
    (root / "native/overlay/src/models/ours.cpp").write_text("int ours;\n")
    make_patch(root, "fix-tile-barrier", diff_of(upstream, FIX))
    make_patch(root, "hook-arch-ours", diff_of(upstream, HOOK))
    (root / "patches/series").write_text("# fixes\nfix-tile-barrier.patch\n# hooks\nhook-arch-ours.patch\n")
    return root


def call(root: Path, *args: str | Path) -> int:
    """The verb, on that checkout."""
    return cli.main(["patch", "--root", str(root), *map(str, args)])


def refused(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> str:
    """`apply` stops with exit code 1 and one line that has these words, and writes nothing."""
    capsys.readouterr()
    assert call(root, "apply", "--into", root / "out") == 1
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in err
    assert all(word in lines[0] for word in words), lines[0]
    assert not (root / "out").exists()
    return lines[0]


def check_says(capsys: pytest.CaptureFixture[str], root: Path, text: str) -> None:
    """`check` ends with exit code 3 and names this."""
    capsys.readouterr()
    assert call(root, "check") == 3
    out = capsys.readouterr().out
    assert text in out, out


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def repin(root: Path, **fields: object) -> None:
    path = root / "vendor/llama.cpp.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def repack(root: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """Rewrites the cached archive member by member and pins its new hash; `change(name, data)` gives the new bytes or
    None."""
    path = root / "vendor/cache/pkg-1.tar.gz"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read(), m.mode) for m in tar if m.isfile()]
    with tarfile.open(path, "w:gz") as tar:
        for name, data, mode in members:
            new = change(name, data)
            if new is not None:
                add_member(tar, name, new, mode)
    repin(root, archive_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def age(folder: Path) -> dict[str, int]:
    for p in folder.rglob("*"):
        os.utime(p, ns=(10**18, 10**18))
    return times(folder)
