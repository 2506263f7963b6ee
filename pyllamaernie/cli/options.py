"""Options that several verbs share, and what is wrong with what they were given."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pyllamaernie.cli.messages import say
from pyllamaernie.compare.samples import QUESTION, ask_pictures
from pyllamaernie.errors import InputError
from pyllamaernie.hub.choice import RUNNABLE, UNQUANTIZED, Wish
from pyllamaernie.hub.converted import model_of
from pyllamaernie.hub.library import quiet_unless_terminal
from pyllamaernie.hub.names import parse
from pyllamaernie.hub.resolve import resolve

MODEL = "GGUF file, or a name on a hub: org/name or org/name:Q4_K_M"


def add_model(group: argparse._ArgumentGroup) -> None:
    """--model and --mmproj, for every verb that loads a model."""
    group.add_argument("-m", "--model", metavar="FILE", help=f"{MODEL} (default: the embedded model)")
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


def local_model(verb: str, text: str, *, prefer: tuple[str, ...] = RUNNABLE) -> tuple[str, str | None]:
    """The GGUF file of a path or of a name on a hub, and the projector that lies with it there.

    It is fetched, and made of a folder, unless it is on this disk. A path stays as it is, whether or not it is there.
    Raises: OfflineError, HubError, DiskSpaceError, ConvertError.
    """
    name = parse(text)
    if name is None:
        return text, None
    quiet_unless_terminal(text)
    found = resolve(name, wish=Wish(prefer=prefer), say=partial(say, verb))
    if found.model is not None:
        return str(found.model), None if found.mmproj is None else str(found.mmproj)
    return str(model_of(found, _convert, say=partial(say, verb))), None  # its projector lies beside it


def take_model(verb: str, args: argparse.Namespace, *, prefer: tuple[str, ...] = RUNNABLE) -> None:
    """`local_model` for args.model, and for args.mmproj where that is to be found."""
    if args.model is not None:
        args.model, mmproj = local_model(verb, args.model, prefer=prefer)
        if args.mmproj == "auto" and mmproj is not None:
            args.mmproj = mmproj


def local_source(verb: str, text: str, *, prefer: tuple[str, ...] = UNQUANTIZED) -> str:
    """The Hugging Face folder of a path or of a name on a hub, else its GGUF file. Raises: as `local_model`."""
    name = parse(text)
    if name is None:
        return text
    quiet_unless_terminal(text)
    found = resolve(name, wish=Wish(prefer=prefer, folder_first=True), say=partial(say, verb))
    if found.folder is None:
        return str(found.model)
    if name.type is not None:
        raise InputError(
            f"{name.repo} holds no GGUF files, so {name} names none; its folder is {name.repo}, without a type"
        )
    return str(found.folder)


def _convert(folder: Path, output: Path, type: str) -> None:
    from pyllamaernie.convert import convert

    convert(folder, output, type=type)
