"""Exact token ids through a second context on an engine's weights: every row of logits."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import numpy as np

from pyllamaernie import _core, log
from pyllamaernie.errors import ContextOverflowError, DecodeError, InputError
from pyllamaernie.gguf.header import Header
from pyllamaernie.gguf.projector import is_ernie_projector
from pyllamaernie.llama.context import N_CTX_MIN, ContextOptions
from pyllamaernie.llama.limits import video_limits
from pyllamaernie.llama.markers import find_markers, split_runs
from pyllamaernie.media.image import Image
from pyllamaernie.media.video import Video

P = ParamSpec("P")
T = TypeVar("T")


class Scorer:
    """A second context on an engine's weights, for exact token ids. Not shared between threads without its lock."""

    def __init__(
        self, engine: _core.Engine, options: ContextOptions, projector: Header | None, *, trace: bool = False
    ) -> None:
        self._engine = engine
        self._options = options
        self._projector = projector
        self._trace = trace
        self._session: _core.Session | None = None
        self._has_projector = False
        self.lock = threading.Lock()
        self.markers = find_markers(engine) if projector else ()  # to a text model they are words like others
        self._is_ernie = projector is not None and is_ernie_projector(projector)
        info = _core.model_info(engine)
        self.n_vocab: int = info["n_vocab"]
        self.n_ctx_train: int = info["n_ctx_train"]

    @property
    def session(self) -> _core.Session:
        """The native session; `last_nodes`, `compute_buffer_bytes` and `n_graph_reuse` are for measurement."""
        return self._open(0)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
            self._has_projector = False

    def logits(
        self, input_ids: Sequence[int], images: Sequence[Image] = (), videos: Sequence[Video] = ()
    ) -> np.ndarray:
        """Logits of every row, for media as `Llama.load_image` and `load_video` hand them over.

        Shapes: (n_tokens,), pictures, videos -> (n_tokens, n_vocab) float32.
        Raises: InputError, ContextOverflowError, DecodeError.
        """
        ids = self._checked(input_ids)
        runs = split_runs(ids, self.markers, with_ends=self._is_ernie)
        given: dict[str, list[Image | Video]] = {"image": [*images], "video": [*videos]}
        for kind, media in given.items():
            n_runs = sum(run[0] == kind for run in runs)
            if n_runs != len(media):
                word = kind.upper()
                raise InputError(
                    f"input_ids hold {n_runs} <|{word}_START|>..<|{word}_END|> runs, "
                    f"but {len(media)} {kind}s were given"
                )
        with self.lock:
            session = self._open(len(ids))
            session.clear()
            rows = []
            n_past = 0
            for kind, begin, end in runs:
                if kind == "text":
                    tokens = np.asarray(ids[begin:end], np.int32)
                    rows.append(self._call(session.decode_tokens, tokens, n_past))
                    n_past += end - begin
                else:
                    chunk = self._chunk(session, given[kind].pop(0), end - begin)
                    rows.append(self._call(session.decode_media, chunk, self._call(session.encode, chunk), n_past))
                    n_past += chunk.n_pos
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _chunk(self, session: _core.Session, medium: Image | Video, n_ids: int) -> _core.MediaChunk:
        """The medium as the projector takes it; the ids must leave as much room as it needs."""
        assert self._projector is not None  # without one there are no markers, so no runs of media
        if not self._has_projector:
            threads, gpu = self._options["n_threads"], bool(_core.gpu_devices(False))
            self._call(session.load_projector, os.fspath(self._projector.path), threads, gpu)
            self._has_projector = True
        if isinstance(medium, Image):
            name = f"a picture of {medium.width}x{medium.height}"
            chunk = self._call(session.tokenize_image, medium.rgb)
        else:
            limits = video_limits(self._projector)
            assert limits is not None  # `load_video` refuses the others
            frames = self._frames(medium, n_ids - 2, limits)
            n_frames, height, width, _ = frames.shape
            name = f"a video of {n_frames} frames of {width}x{height}"
            chunk = self._call(session.tokenize_video, frames)
        if chunk.n_tokens != n_ids:
            raise InputError(
                f"{name} takes {chunk.n_tokens} tokens{' with its START and END' if self._is_ernie else ''}, "
                f"but input_ids hold {n_ids} for it"
            )
        return chunk

    @staticmethod
    def _frames(video: Video, n_slots: int, limits: tuple[int, int]) -> np.ndarray:
        """The frames at the projector's size or, where the ids leave room for just that, at their own."""
        own = video.frames[0].width * video.frames[0].height
        if video.n_tokens(*limits) != n_slots and video.n_tokens(own, own) == n_slots:
            return video.frames_array(own, own)
        return video.frames_array(*limits)

    def _checked(self, input_ids: Sequence[int]) -> list[int]:
        array = np.asarray(input_ids)
        if array.ndim == 2 and array.shape[0] == 1:
            array = array[0]
        if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"input_ids is a non-empty sequence of token ids, got shape {array.shape} {array.dtype}")
        bad = np.flatnonzero((array < 0) | (array >= self.n_vocab))
        if bad.size:
            raise InputError(f"input_ids[{bad[0]}] is {array[bad[0]]}; token ids are 0 .. {self.n_vocab - 1}")
        return [int(i) for i in array]

    def _open(self, n_tokens: int) -> _core.Session:
        if n_tokens > self.n_ctx_train:
            raise ContextOverflowError(f"{n_tokens} tokens, but the model was trained for {self.n_ctx_train}")
        if self._session is not None and self._session.n_ctx < n_tokens:
            self.close()
        if self._session is None:
            n_ctx = max(N_CTX_MIN, (n_tokens + 255) // 256 * 256)
            self._session = self._call(
                lambda: _core.Session(self._engine, **self._options, n_ctx=n_ctx, trace=self._trace)
            )
        return self._session

    @staticmethod
    def _call(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        try:
            return function(*args, **options)
        except (RuntimeError, ValueError) as error:
            reason = log.last_error()
            raise DecodeError(f"{error}{': ' + reason if reason else ''}") from error
