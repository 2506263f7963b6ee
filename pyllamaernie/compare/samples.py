"""Texts and pictures that a model is measured on, as every verb that measures takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pyllamaernie.errors import InputError

QUESTION = "Describe the picture."
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def read_text(path: Path) -> str:
    """A UTF-8 file without its last newline, as upstream reads its -f. Raises: InputError, OSError."""
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start}") from None


def folder_pictures(folder: str | None) -> list[Path]:
    """The pictures of a folder, sorted. Raises: InputError when there is no such folder, or no picture in it."""
    if folder is None:
        return []
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder} is not a folder")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return found


def ask_pictures(files: Sequence[str], folder: str | None, questions: Sequence[str]) -> list[tuple[str | Path, str]]:
    """Each picture, those of the folder last, with its question: one for each file, or one for all, or QUESTION.

    Raises: InputError as `folder_pictures`.
    """
    found: list[str | Path] = [*files, *folder_pictures(folder)]
    asked = list(questions) if len(questions) > 1 else [*(questions or [QUESTION])] * len(found)
    return list(zip(found, [*asked, *[QUESTION] * (len(found) - len(asked))], strict=True))
