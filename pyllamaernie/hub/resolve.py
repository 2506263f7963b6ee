"""A hub name to files on this machine. What lies here whole is taken without asking anyone; the rest is fetched."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyllamaernie.errors import DiskSpaceError, HubError, OfflineError
from pyllamaernie.files import size_text
from pyllamaernie.hub.cache import Listing, Repo, RepoFile
from pyllamaernie.hub.choice import DEFAULT, Chosen, Wish, choose
from pyllamaernie.hub.fetch import fetch, fetch_into, hub_listing
from pyllamaernie.hub.library import endpoint
from pyllamaernie.hub.names import Name

log = logging.getLogger("pyllamaernie.hub")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """Where the files of a name are: a GGUF model (its first part) with what goes beside it, or a folder."""

    name: Name
    commit: str
    files: tuple[Path, ...]
    model: Path | None = None
    mmproj: Path | None = None
    mtp: Path | None = None
    folder: Path | None = None


def resolve(
    name: Name,
    *,
    wish: Wish = DEFAULT,
    refresh: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    say: Say = log.info,
) -> Found:
    """The files that a name means, fetched unless they lie here. `refresh` asks the hub for a newer revision.

    `say` gets a line before anything is fetched.
    Raises: OfflineError, HubError, DiskSpaceError.
    """
    place = Repo(name.repo, cache_dir)
    old = place.listing()
    pick = partial(_picked, place, name, wish)
    if old is not None and old.is_whole and not refresh and (found := pick(old)):
        return found
    try:
        listing = hub_listing(name.repo, str(name))
    except OfflineError:
        if old is None or refresh:
            raise
        if found := pick(old):  # here also files that another program fetched
            return found
        raise OfflineError(_not_here(name, old)) from None
    chosen = choose(name, (f.name for f in listing.files), wish)
    place.keep(listing)
    if missing := _missing(place, listing, chosen):
        n_bytes = sum(f.size_bytes - place.n_bytes_here(f) for f in missing)
        announce(name, missing, n_bytes, place.cache, say)
        for file in missing:
            fetch(place, listing, file, str(name))
    place.point(listing.commit)
    return _found(place, name, listing, chosen)


def _picked(place: Repo, name: Name, wish: Wish, listing: Listing) -> Found | None:
    """What a name means among the files of a listing, if all of it lies here."""
    try:
        chosen = choose(name, (f.name for f in listing.files), wish)
    except HubError:  # the hub may have more by now
        return None
    return None if _missing(place, listing, chosen) else _found(place, name, listing, chosen)


def resolve_into(folder: Path, name: Name, listing: Listing, chosen: Chosen, say: Say = log.info) -> Found:
    """The chosen files under their own names in a folder of the user's. Raises: as `resolve`."""
    wanted = [f for f in _files(listing, chosen) if not (folder / f.name).is_file()]
    if wanted:
        announce(name, wanted, sum(f.size_bytes for f in wanted), folder, say)
    for file in _files(listing, chosen):
        fetch_into(folder, listing, file, str(name))
    return _at(folder, name, listing, chosen)


def announce(name: Name, files: Sequence[RepoFile], n_bytes: int, folder: Path, say: Say) -> None:
    """Say what is going to be fetched, after a look at the disk. Raises: DiskSpaceError."""
    home = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(home).free
    if n_bytes > free:
        raise DiskSpaceError(
            f"{name}: {size_text(n_bytes)} are to be fetched into {folder}, {size_text(free)} are free there; "
            "HF_HUB_CACHE names another place"
        )
    total = sum(file.size_bytes for file in files)
    here = f", {size_text(total - n_bytes)} of {size_text(total)} are here from before" if n_bytes < total else ""
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    say(f"{name} is not on this disk: fetching {count}, {size_text(n_bytes)}, from {endpoint()} into {folder}{here}")


def _files(listing: Listing, chosen: Chosen) -> list[RepoFile]:
    by_name = {file.name: file for file in listing.files}
    return [by_name[name] for name in chosen.files]


def _missing(place: Repo, listing: Listing, chosen: Chosen) -> list[RepoFile]:
    return [file for file in _files(listing, chosen) if not place.has(listing.commit, file)]


def _found(place: Repo, name: Name, listing: Listing, chosen: Chosen) -> Found:
    home = place.snapshot(listing.commit)
    if chosen.folder:  # under the repository's own name, by which a conversion names the model
        named = place.made(listing.commit) / name.repo.split("/")[1]
        if not named.is_dir():
            named.parent.mkdir(parents=True, exist_ok=True)
            try:
                named.symlink_to(os.path.relpath(home, named.parent), target_is_directory=True)
            except FileExistsError:  # another process was quicker
                pass
            except OSError:  # no links here
                named = home
        home = named
    return _at(home, name, listing, chosen)


def _at(home: Path, name: Name, listing: Listing, chosen: Chosen) -> Found:
    return Found(
        name,
        listing.commit,
        tuple(home / file for file in chosen.files),
        home / chosen.parts[0] if chosen.parts else None,
        home / chosen.mmproj if chosen.mmproj else None,
        home / chosen.mtp if chosen.mtp else None,
        home if chosen.folder else None,
    )


def _not_here(name: Name, old: Listing) -> str:
    held = ", ".join(file.name for file in old.files if file.name.endswith((".gguf", ".safetensors")))
    return (
        f"{name} is not on this disk (of {name.repo} there is {held or 'no model'}), and {endpoint()} did not answer; "
        f"`pyllamaernie pull {name}` fetches it when there is a network"
    )
