"""What a user names where a model is taken: a path, or `org/name` or `org/name:TYPE` on a hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pyllamaernie.errors import InputError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"({_PART}/{_PART})(?::({_PART}))?")
_ENDINGS = (".gguf", ".safetensors", ".json", ".bin", ".txt", ".git")  # a file that is not there, not a repository


@dataclass(frozen=True)
class Name:
    """A repository, and the type of file that is meant (as written; None leaves the choice to us)."""

    repo: str
    type: str | None = None

    def __str__(self) -> str:
        return self.repo if self.type is None else f"{self.repo}:{self.type}"


def parse(text: str | os.PathLike[str]) -> Name | None:
    """The hub name that a text is; None for a path: one that exists, or one that no repository could have."""
    text = os.fspath(text)
    found = _NAME.fullmatch(text)
    if found is None or found[1].lower().endswith(_ENDINGS) or os.path.lexists(text):
        return None
    return Name(found[1], found[2])


def hub_name(text: str) -> Name:
    """The same where nothing but a hub name makes sense, whatever lies here. Raises: InputError."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise InputError(f"{text!r} is no name on a hub; expected org/name or org/name:TYPE, such as org/name:Q4_K_M")
    return Name(found[1], found[2])
