"""Texts and pictures that a model is measured on, as every verb that measures takes them."""

from __future__ import annotations

import argparse
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


def add_pictures(group: argparse._ArgumentGroup) -> None:
    """--image, --images and --prompt, for `asked_pictures`."""
    group.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    group.add_argument("--images", metavar="FOLDER", help="every picture of a folder")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"the question for a picture: one for each --image, or one for all (default: {QUESTION})",
    )


def wrong_prompts(args: argparse.Namespace) -> str | None:
    """What is wrong with the number of --prompt beside that of --image."""
    if len(args.prompt) in (0, 1, len(args.image)):
        return None
    return f"{len(args.prompt)} --prompt for {len(args.image)} --image; give one for each, or one for all"


def asked_pictures(args: argparse.Namespace) -> list[tuple[str | Path, str]]:
    """Each picture of --image and --images with its question. Raises: InputError (`folder_pictures`)."""
    files = [*args.image, *folder_pictures(args.images)]
    questions = args.prompt if len(args.prompt) > 1 else (args.prompt or [QUESTION]) * len(files)
    return list(zip(files, [*questions, *[QUESTION] * (len(files) - len(questions))], strict=True))
