"""The pinned source: fetched, proved, and every way in which it can be another one."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zlib
from pathlib import Path

import pytest
from patch_checkout import FILES, add_member, call, edit, git, refused, repack, repin, times

from pyllamaernie.patching.listing import git_tree_id, scan_files


def test_fetch_unpacks_only_the_folder_and_agrees_with_git(root: Path, upstream: Path) -> None:
    assert call(root, "fetch") == 0
    tree = root / "vendor/llama.cpp"
    assert set(times(tree)) == set(FILES)
    assert git_tree_id(tree, scan_files(tree)) == git(upstream / "tree", "rev-parse", "HEAD^{tree}").strip()
    assert sorted(p.name for p in (root / "vendor").iterdir()) == [
        "cache",
        "llama.cpp",
        "llama.cpp.files",
        "llama.cpp.json",
    ]
    assert call(root, "fetch", "--verify-commit") == 0


@pytest.mark.parametrize("tree_is_there", [False, True])
def test_one_changed_byte_of_the_archive_fails_loudly(
    root: Path, capsys: pytest.CaptureFixture[str], tree_is_there: bool
) -> None:
    if tree_is_there:
        assert call(root, "fetch") == 0
    path = root / "vendor/cache/pkg-1.tar.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(capsys, root, str(path), "is not the archive of pkg 1", "sha256")
    assert (root / "vendor/llama.cpp").exists() == tree_is_there


def test_truncated_archive_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "vendor/cache/pkg-1.tar.gz"
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    refused(capsys, root, f"{len(data) - 200} bytes, the pin has {len(data)}")
    repin(root, archive_sha256=hashlib.sha256(data[:-200]).hexdigest())  # even a pinned one
    refused(capsys, root, "damaged archive")
    assert not (root / "vendor/llama.cpp").exists()


@pytest.mark.parametrize("name", ["../evil", "pkg-1/vendor/up/../../../evil", "/tmp/evil-of-test-patches"])
def test_archive_with_a_climbing_path_is_refused(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = root / "vendor/cache/pkg-1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        add_member(tar, name, b"evil")
    repin(root, archive_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    refused(capsys, root, "refuses to unpack", name, "leaves the folder")
    assert not list(root.parent.rglob("evil*")) and not Path("/tmp/evil-of-test-patches").exists()


def test_archive_with_a_link_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "vendor/cache/pkg-1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("pkg-1/vendor/up/src")
        info.type, info.linkname = tarfile.SYMTYPE, "/tmp"
        tar.addfile(info)
    repin(root, archive_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    refused(capsys, root, "pkg-1/vendor/up/src", "a link or special file")


def test_archive_whose_tree_is_not_the_commits_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repack(root, lambda name, data: data + b"//\n" if name.endswith("tile.cpp") else data)
    refused(capsys, root, "commit", "are tree")
    assert not (root / "vendor/llama.cpp").exists()


def test_archive_of_another_commit_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repack(root, lambda name, data: b"f" * 40 + b"\n" if name.endswith("/HEAD") else data)
    refused(capsys, root, "HEAD says 'ffff")


def test_archive_with_a_forged_commit_object_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forge(name: str, data: bytes) -> bytes:
        return zlib.compress(zlib.decompress(data).replace(b"A Tester", b"B Tester")) if "/objects/" in name else data

    repack(root, forge)
    refused(capsys, root, "does not hash to the commit")


def test_archive_without_the_commit_object_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repack(root, lambda name, data: None if "/objects/" in name else data)
    refused(capsys, root, "the commit object", "missing")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tree: (tree / "src/tile.cpp").write_text("x"), "src/tile.cpp has other bytes"),
        (lambda tree: (tree / "src/tile.cpp").unlink(), "src/tile.cpp is missing"),
        (lambda tree: (tree / "src/more.cpp").write_text("x"), "src/more.cpp is not part of the pin"),
        (lambda tree: (tree / "run.sh").chmod(0o644), "run.sh has mode 100644 instead of 100755"),
        (lambda tree: (tree / "src/link").symlink_to("tile.cpp"), "a link or special file"),
    ],
)
def test_changed_vendored_tree_fails_and_names_the_file(
    root: Path, capsys: pytest.CaptureFixture[str], spoil, words: str
) -> None:
    assert call(root, "fetch") == 0
    spoil(root / "vendor/llama.cpp")
    refused(capsys, root, "vendor/llama.cpp", words)


def test_given_tree_is_checked_unless_told_otherwise(
    root: Path, upstream: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = root / "mine"
    shutil.copytree(upstream / "tree", mine)  # with its .git, which does not count
    monkeypatch.setenv("LLAMA_CPP_DIR", str(mine))
    assert call(root, "apply", "--into", root / "first") == 0
    assert not (root / "vendor/llama.cpp").exists()
    edit(mine / "include/llama.h", "llama", "lama")
    refused(capsys, root, "LLAMA_CPP_DIR", "tree digest", "LLAMA_CPP_DIR_UNCHECKED=1")
    monkeypatch.setenv("LLAMA_CPP_DIR_UNCHECKED", "1")
    assert call(root, "apply", "--into", root / "second") == 0
    assert (root / "second/include/llama.h").read_text() == "int lama;\n"


def test_no_source_and_no_network_says_what_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "vendor/cache/pkg-1.tar.gz").unlink()
    assert call(root, "fetch") == 6
    err = capsys.readouterr().err
    assert "pkg==1" in err and "LLAMA_CPP_DIR" in err and "Traceback" not in err
    assert [p.name for p in (root / "vendor").iterdir() if p.name.startswith(".")] == []


def test_cache_folder_can_lie_elsewhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "vendor/cache").rename(root.parent / "elsewhere")
    monkeypatch.setenv("PYLLAMAERNIE_CACHE", str(root.parent / "elsewhere"))
    assert call(root, "fetch") == 0


@pytest.mark.parametrize("text", ["", "[]", '{"commit": "x"}'])
def test_broken_pin_fails_loudly(root: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (root / "vendor/llama.cpp.json").write_text(text)
    refused(capsys, root, "vendor/llama.cpp.json", "not a valid pin")
