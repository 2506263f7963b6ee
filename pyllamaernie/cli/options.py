"""Options that several verbs share, and what is wrong with what they were given."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyllamaernie.compare.samples import QUESTION, ask_pictures


def add_model(group: argparse._ArgumentGroup) -> None:
    """--model and --mmproj, for every verb that loads a model."""
    group.add_argument("-m", "--model", metavar="FILE", help="GGUF file (default: the embedded model)")
    group.add_argument(
        "--mmproj", metavar="FILE", default="auto", help="projector for pictures (default: the one beside the model)"
    )


def add_threads(group: argparse._ActionsContainer) -> None:
    """--threads, for `not_positive`."""
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")


def add_workers(group: argparse._ArgumentGroup) -> None:
    """--rpc, for every verb that can spread a model over workers."""
    group.add_argument("--rpc", metavar="HOST:PORT,...", help="spread the layers over these workers (pyllamaernie rpc)")


def not_positive(args: argparse.Namespace, *names: str) -> str | None:
    """What is wrong with the first of these whole numbers that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            return f"--{name} is a positive whole number, got {value}"
    return None


def too_small(args: argparse.Namespace, **least: int) -> str | None:
    """What is wrong with the first of these whole numbers that is given and below its least."""
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and value < limit:
            return f"--{name.replace('_', '-')} is a whole number from {limit} up, got {value}"
    return None


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
    return ask_pictures(args.image, args.images, args.prompt)


def add_budget(group: argparse._MutuallyExclusiveGroup) -> None:
    """--size and --bpw, for every verb that plans."""
    group.add_argument("--size", metavar="BYTES", help="of the whole file, such as 12GiB, 800MB or 123456789")
    group.add_argument("--bpw", type=float, metavar="X", help="bits per weight over all tensors, such as 3.5")


def add_limits(group: argparse._ArgumentGroup) -> None:
    """--pin, --min, --max and --types, for every verb that plans."""
    for kind, text in (
        ("pin", "this type for the tensors in whose name the pattern is found; may be repeated, as the next two"),
        ("min", "no type with fewer bits for them"),
        ("max", "no type with more bits for them"),
    ):
        group.add_argument(f"--{kind}", action="append", default=[], metavar="REGEX=TYPE", help=text)
    group.add_argument(
        "--types",
        metavar="LIST",
        help="only these, such as Q4_K,Q6_K,Q8_0 (default: all that any llama.cpp loads; CCQ types have to be named)",
    )
