"""GGUF files made of a folder that a hub holds: made once, kept beside it in the cache, whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pyllamaernie.errors import HubError
from pyllamaernie.files import hidden_folder
from pyllamaernie.hub.cache import Repo
from pyllamaernie.hub.resolve import Found, Say, log

AUTO = "auto"  # the checkpoint's own 16-bit type
TYPES = ("F32", "F16", "BF16", "Q8_0")

# (folder, file to write, type): writes it and what goes beside it
Convert = Callable[[Path, Path, str], None]


def model_of(
    found: Found, convert: Convert, *, cache_dir: str | os.PathLike[str] | None = None, say: Say = log.info
) -> Path:
    """The GGUF file of a folder, converted unless it is here, in the type of the name; mmproj and mtp lie beside it.

    Raises: HubError for a type that a conversion does not make; what `convert` raises.
    """
    if found.folder is None:
        raise HubError(f"{found.name}: no folder to convert")
    repo, asked = found.name.repo, found.name.type
    if asked is not None and asked.upper() not in TYPES:
        raise HubError(
            f"{repo}: holds no GGUF files, and its folder becomes {', '.join(TYPES)} on the way; for {asked}: "
            f"`pyllamaernie quantize {repo} --type {asked} -o OUT.gguf`"
        )
    place = Repo(repo, cache_dir)
    type = AUTO if asked is None else asked.upper()
    home, title = place.made(found.commit) / type, repo.split("/")[1]
    model = home / f"{title}-{found.commit[:7]}.gguf"
    if model.is_file():
        return model
    say(f"converting {repo} to GGUF ({type}), once: it is kept in {home}")
    home.parent.mkdir(parents=True, exist_ok=True)
    with hidden_folder(home) as hidden:  # beside its place, so that a rename puts all files there at once
        scratch = hidden / type
        scratch.mkdir()
        convert(found.folder, scratch / model.name, type.lower())
        try:
            os.rename(scratch, home)
        except OSError:
            if not model.is_file():  # else another process was quicker, and its files are the same
                raise
    return model
