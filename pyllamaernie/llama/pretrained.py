"""The files of `Llama.from_pretrained`: a hub's, in the cache or in a folder of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyllamaernie.errors import ConvertError, HubError
from pyllamaernie.hub.choice import Wish, choose
from pyllamaernie.hub.converted import model_of
from pyllamaernie.hub.fetch import hub_listing
from pyllamaernie.hub.names import hub_name
from pyllamaernie.hub.resolve import resolve, resolve_into


def pretrained_files(
    repo_id: str,
    filename: str | None,
    additional_files: Sequence[str],
    local_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[Path, Path | None]:
    """The GGUF file and its projector. Raises: OfflineError, HubError, DiskSpaceError, ConvertError."""
    name, wish = hub_name(repo_id), Wish(filename=filename, more=tuple(additional_files))
    if local_dir is None:
        found = resolve(name, wish=wish, cache_dir=cache_dir)
    else:
        listing = hub_listing(name.repo, str(name))
        chosen = choose(name, (file.name for file in listing.files), wish)
        if not chosen.parts:
            raise HubError(f"{name.repo}: holds no GGUF files; without local_dir its folder is converted and kept")
        found = resolve_into(Path(local_dir), name, listing, chosen)
    if found.model is not None:
        return found.model, found.mmproj
    return model_of(found, _convert_apart, cache_dir=cache_dir), None  # its projector lies beside it


def _convert_apart(folder: Path, output: Path, type: str) -> None:
    """`pyllamaernie convert` in a process of its own: conversion stands above this room in the table of rooms."""
    words = [sys.executable, "-m", "pyllamaernie", "convert", str(folder), "-o", str(output), "--type", type]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConvertError(said[-1].removeprefix("pyllamaernie: "))
