"""A repository's files from a hub: which there are, and each of them resumed, checked, whole or not there.

Requests, tokens, retries and the progress bar are huggingface_hub's. Going on where an earlier run stopped is done
here, since its release 2 keeps no part of a file behind; so is the check of what came against the hub's hash, which is
the ETag (SHA-256 of a large file, git's SHA-1 of a small one).
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from pyllamaernie.errors import HubError
from pyllamaernie.hub.cache import Listing, Repo, RepoFile
from pyllamaernie.hub.library import library, module, translated

_PIECE_BYTES = 1 << 20
_N_BYTES_HTTP = 50 * 10**9  # a larger file comes by huggingface_hub's other protocol, which checks it but never resumes


def hub_listing(repo: str, what: str) -> Listing:
    """What a repository holds now. Raises: OfflineError, HubError."""
    hub = library(what)
    with translated(what, repo):
        info = hub.HfApi().model_info(repo, files_metadata=True)
    files = (_file(sibling) for sibling in info.siblings or ())
    return Listing(repo, str(info.sha), tuple(file for file in files if _is_safe(file.name)))


def fetch(place: Repo, listing: Listing, file: RepoFile, what: str) -> Path:
    """A file in the cache, fetched unless its content lies there. Raises: OfflineError, HubError, DiskSpaceError."""
    hub = library(what)
    with translated(what, place.repo):
        url, etag, size, headers = _source(hub, place.repo, listing.commit, file)
        blob, locks = place.blobs / etag, place.cache / ".locks" / place.folder.name
        for folder in (place.blobs, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with module("utils").WeakFileLock(locks / f"{etag}.lock"):
            if not blob.exists() and size <= _N_BYTES_HTTP:
                _download(url, blob, size, headers, f"{place.repo}/{file.name}", etag)
        # where the content is there, this gives it its name, in the way that the file system allows
        path = hub.hf_hub_download(place.repo, file.name, revision=listing.commit, cache_dir=place.cache)
    return Path(path)


def fetch_into(folder: Path, listing: Listing, file: RepoFile, what: str) -> Path:
    """A file under its own name in a folder of the user's; one of the right size is taken as it is."""
    hub, path = library(what), folder / file.name
    if path.is_file() and path.stat().st_size == file.size_bytes:
        return path
    with translated(what, listing.repo):
        url, etag, size, headers = _source(hub, listing.repo, listing.commit, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if size > _N_BYTES_HTTP:
            return Path(hub.hf_hub_download(listing.repo, file.name, revision=listing.commit, local_dir=folder))
        _download(url, path, size, headers, f"{listing.repo}/{file.name}", etag)
    return path


def _file(sibling: Any) -> RepoFile:
    lfs = sibling.lfs
    sha256 = getattr(lfs, "sha256", None) or (lfs.get("sha256") if isinstance(lfs, dict) else None)
    return RepoFile(str(sibling.rfilename), int(sibling.size or 0), str(sha256 or sibling.blob_id or ""))


def _is_safe(name: str) -> bool:
    """Whether a name stays in the folder that it counts from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def _source(hub: Any, repo: str, commit: str, file: RepoFile) -> tuple[str, str, int, dict[str, str]]:
    """Where a file comes from, its hash, its size, and the headers to ask with."""
    url = hub.hf_hub_url(repo, file.name, revision=commit)
    found = hub.get_hf_file_metadata(url)
    etag, size = str(found.etag or ""), file.size_bytes if found.size is None else int(found.size)
    if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_.-]*", etag):
        raise HubError(f"{repo}/{file.name}: the hub gives no hash of it (ETag {etag!r})")
    headers = dict(module("utils").build_hf_headers())
    if found.location and urlsplit(found.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the token is the hub's, not its storage's
    return found.location or url, etag, size, headers


def _download(url: str, target: Path, size: int, headers: dict[str, str], name: str, etag: str) -> None:
    part = target.with_name(f"{target.name}.incomplete")
    n_here = part.stat().st_size if part.is_file() else 0
    if n_here > size:
        part.unlink()
        n_here = 0
    with open(part, "ab") as file:
        http_get = module("file_download").http_get
        http_get(url, file, resume_size=n_here, headers=headers, expected_size=size, displayed_filename=name)
    found = _hash(part, etag)
    if found is not None and found != etag:
        part.unlink()
        raise HubError(
            f"{name}: what came is not what the hub holds (hash {found[:16]}..., expected {etag[:16]}...); it was "
            "removed, and the same command fetches it again"
        )
    os.replace(part, target)


def _hash(path: Path, like: str) -> str | None:
    """The hash of a file, of the kind that `like` is; None where that is no hash that we know."""
    if not re.fullmatch(r"[0-9a-f]+", like) or len(like) not in (40, 64):
        return None
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
