"""Which projector (mmproj) belongs to a model, and whether the two fit. Nothing is loaded here but headers."""

from __future__ import annotations

import os

from pyllamaernie.errors import ProjectorMismatchError
from pyllamaernie.gguf.header import Header, read_header

ERNIE_PROJECTOR = "ernie4_5_vl"  # clip.projector_type of ERNIE 4.5 VL


def find_projector(model: Header, mmproj: str | os.PathLike[str] | None) -> Header | None:
    """The projector of a model: the named file, or with "auto" the one beside it, or none.

    "auto" looks for `mmproj-<name of the model>.gguf`, then for a single `*mmproj*.gguf` in the folder.
    Raises: ModelNotFoundError, CorruptModelError, ProjectorMismatchError.
    """
    if mmproj is None:
        return None
    if mmproj != "auto":
        header = read_header(mmproj)
        check_projector(model, header)
        return header
    beside = model.path.parent / f"mmproj-{model.path.stem}.gguf"
    if beside.is_file():
        header = read_header(beside)
        check_projector(model, header)
        return header
    others = sorted(p for p in model.path.parent.glob("*mmproj*.gguf") if p != model.path)
    if len(others) == 1:
        header = read_header(others[0])
        # an unrelated file that only happens to lie here must not spoil a text model
        if not is_vision_model(model) and not _fits(model, header):
            return None
        check_projector(model, header)
        return header
    return None


def check_projector(model: Header, mmproj: Header) -> None:
    """Raise ProjectorMismatchError unless the projector's output is as wide as the model's embedding."""
    if not mmproj.is_projector:
        raise ProjectorMismatchError(
            f"{mmproj.path} is not a projector (architecture {mmproj.arch!r}, expected 'clip'); "
            f"give the mmproj file that belongs to {model.path}"
        )
    width = mmproj.metadata.get("clip.vision.projection_dim")
    n_embd = model.get("embedding_length")
    if width != n_embd:
        raise ProjectorMismatchError(
            f"{mmproj.path} makes rows of width {width}, but {model.path} takes width {n_embd}: "
            "they are not from the same model"
        )


def is_vision_model(model: Header) -> bool:
    """Whether the text model was made for pictures."""
    return "vl" in model.arch.lower()


def _fits(model: Header, mmproj: Header) -> bool:
    return mmproj.is_projector and mmproj.metadata.get("clip.vision.projection_dim") == model.get("embedding_length")


def is_ernie_projector(mmproj: Header) -> bool:
    """Whether a projector is ERNIE 4.5 VL's own, whose START and END are part of the media."""
    return bool(mmproj.metadata.get("clip.projector_type") == ERNIE_PROJECTOR)
