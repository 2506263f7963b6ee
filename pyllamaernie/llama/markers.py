"""Markers of media in token ids: where a picture or a video begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyllamaernie import _core
from pyllamaernie.errors import InputError


@dataclass(frozen=True)
class Marker:
    """Token ids that stand around the placeholders of a medium in the ids of the reference processor."""

    kind: str  # image or video
    start: int
    end: int
    slots: frozenset[int]  # Baidu fills a video with the placeholders of images, transformers has one for each


def find_markers(engine: _core.Engine) -> tuple[Marker, ...]:
    """The media that the vocabulary has markers for."""

    def token(name: str) -> int | None:
        found = _core.tokenize(engine, f"<|{name}|>".encode(), False, True)
        return found[0] if len(found) == 1 else None

    slots = frozenset(t for t in (token("IMAGE_PLACEHOLDER"), token("VIDEO_PLACEHOLDER")) if t is not None)
    markers = []
    for kind in ("image", "video"):
        start, end = token(f"{kind.upper()}_START"), token(f"{kind.upper()}_END")
        if start is not None and end is not None:
            markers.append(Marker(kind, start, end, slots))
    return tuple(markers)


def split_runs(ids: Sequence[int], markers: Sequence[Marker], *, with_ends: bool = True) -> list[tuple[str, int, int]]:
    """Cut ids into (text | image | video, begin, end) runs; a medium runs from its START to its END, both included.

    Without `with_ends` START and END are text, as they are to all projectors but ERNIE's. A marker with no placeholders
    behind it is text: a model may say one.
    """
    openers = {marker.start: marker for marker in markers}
    runs: list[tuple[str, int, int]] = []
    begin = position = 0
    while position < len(ids):
        marker = openers.get(ids[position])
        stop = position + 1
        while marker is not None and stop < len(ids) and ids[stop] in marker.slots:
            stop += 1
        if marker is None or stop == position + 1:
            position += 1
            continue
        if stop == len(ids) or ids[stop] != marker.end:
            raise InputError(
                f"token {position} opens {'an' if marker.kind == 'image' else 'a'} {marker.kind} whose "
                f"{stop - position - 1} placeholders no <|{marker.kind.upper()}_END|> ({marker.end}) follows"
            )
        first, last = (position, stop + 1) if with_ends else (position + 1, stop)
        if first > begin:
            runs.append(("text", begin, first))
        runs.append((marker.kind, first, last))
        begin, position = last, stop + 1
    if begin < len(ids):
        runs.append(("text", begin, len(ids)))
    return runs
