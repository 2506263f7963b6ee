"""The tokens of an open model: text to ids and back, and the logits of exact ids."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyllamaernie import _core, log
from pyllamaernie.errors import InputError
from pyllamaernie.llama.loaded import Loaded
from pyllamaernie.llama.scorer import Scorer


class Tokens(Loaded):
    """The methods that take or give token ids."""

    _lock: threading.Lock  # of opening scorers and of closing
    _scorers: list[Scorer]

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids. `add_bos` adds what the model asks for (ERNIE: nothing); `special` reads markers as tokens."""
        self._require_open()
        if isinstance(text, str):
            text = text.encode("utf-8")
        return _core.tokenize(self.engine, bytes(text), add_bos, special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Bytes of token ids, maybe with a part of a character. `special` writes markers; `prev_tokens` is unused."""
        self._require_open()
        ids = [int(token) for token in tokens]
        bad = next((token for token in ids if not 0 <= token < self.n_vocab()), None)
        if bad is not None:
            raise InputError(f"{bad} is not a token id; they are 0 .. {self.n_vocab() - 1}")
        return _core.detokenize(self.engine, ids, False, special)

    def logits(self, input_ids: Sequence[int], images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> np.ndarray:
        """Logits of every position, for ids exactly as the reference processor makes them (START, placeholders, END).

        Pictures and videos are taken in the order of the ids, and a placeholder run has as many ids as its medium has
        tokens. Frames whose sides are multiples of 28 stay as they are when the ids leave room for just that.
        Shapes: (n_tokens,) -> (n_tokens, n_vocab) float32.
        Raises: InputError, UnsupportedInputError, ContextOverflowError, DecodeError, MediaError.
        """
        self._require_open()
        pictures = [self.load_image(source) for source in images]
        clips = [self.load_video(source, keep_size=isinstance(source, (list, tuple, np.ndarray))) for source in videos]
        result = self.scorer().logits(input_ids, pictures, clips)
        log.drain()
        return result

    def scorer(self, *, trace: bool = False) -> Scorer:
        """The token level behind `logits()`, made on first use: a second context on the same weights.

        With `trace` a new one that records the nodes of each decode, for tests and measurement.
        """
        with self._lock:
            self._require_open()
            if trace or not self._scorers:
                self._scorers.append(Scorer(self.engine, self.context_options, self.projector, trace=trace))
                return self._scorers[-1]
            return self._scorers[0]
