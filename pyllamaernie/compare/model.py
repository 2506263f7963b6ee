"""A loaded file that gives exact rows of logits, for whoever compares or probes: prompts, pictures, answers, speed.

Rows come from a session of its own beside the engine's context, which is only for timing. It knows no other model:
`run` puts several side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyllamaernie import _core, log
from pyllamaernie.compare.table import N_ANSWER
from pyllamaernie.errors import DecodeError, InputError, PyllamaernieError, UnsupportedInputError
from pyllamaernie.gguf.header import Header
from pyllamaernie.gguf.projector import is_ernie_projector
from pyllamaernie.llama.llama import Llama
from pyllamaernie.llama.markers import find_markers
from pyllamaernie.media.image import Image

N_CTX_PICTURES = 8192  # the longest prompt with a picture
N_PREFILL, N_DECODE = 512, 32  # tokens of one timed request
LABEL = "Picture 1:"  # mtmd adds it for ERNIE where the text has none: native/overlay/tools/mtmd/pyllamaernie-mtmd.inc


@dataclass(frozen=True)
class Prompt:
    """Token ids before and behind a picture, as the engine makes them; `answer` is what the reference says."""

    source: Any  # what `Image.of` takes
    before: tuple[int, ...]
    behind: tuple[int, ...]
    answer: tuple[int, ...] = ()


class Model:
    """A file with a context of its own for exact rows. Use it as a context manager, or call `close()`.

    `bos`: the token that each chunk of text begins with, None where the model wants none. `speed`: it will be timed.
    """

    def __init__(
        self, header: Header, mmproj: Any, n_threads: int | None, n_ctx: int, *, speed: bool, use_mmap: bool = True
    ) -> None:
        n_engine = min(N_PREFILL + N_DECODE if speed else 1, int(header.get("context_length") or N_PREFILL))
        self.header = header
        self.llm: Llama = Llama(
            header.path, mmproj=mmproj, n_threads=n_threads, n_ctx=max(n_engine, 64), use_mmap=use_mmap
        )
        try:
            self.n_ctx_train = self.llm.n_ctx_train()
            self.bos: int | None = self.llm.token_bos() if self.llm.adds_bos() else None
            options, n_ctx = self.llm.context_options, min(n_ctx, self.n_ctx_train)
            self.session: _core.Session = self._call(
                lambda: _core.Session(self.llm.engine, **options, n_ctx=n_ctx, trace=False)
            )
            self._marker = next((m for m in find_markers(self.llm.engine) if m.kind == "image"), None)
            projector = self.llm.projector
            self._is_ernie = projector is not None and is_ernie_projector(projector)
            if projector is not None:
                threads, gpu = options["n_threads"], bool(_core.gpu_devices(False))
                self._call(self.session.load_projector, os.fspath(projector.path), threads, gpu)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        session = getattr(self, "session", None)
        if session is not None:
            session.close()
        self.llm.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except (RuntimeError, ValueError) as error:
            reason = next(iter(log.drain()[-1:]), "")
            raise DecodeError(f"{self.header.path}: {error}{': ' + reason if reason else ''}") from None

    def chunks(self, ids: Sequence[int], n_ctx: int, n_max: int | None) -> list[list[int]]:
        """A text in chunks of n_ctx tokens, each begun by BOS where the model wants one, in place of its first token.

        Raises: InputError for chunks longer than the model's context, and for less text than one chunk.
        """
        if n_ctx > self.n_ctx_train:
            raise InputError(
                f"chunks of {n_ctx} tokens, but the model was trained for {self.n_ctx_train}; use smaller ones"
            )
        n = len(ids) // n_ctx
        if n == 0:
            raise InputError(f"the text has {len(ids)} tokens, a chunk takes {n_ctx}; give more text or smaller chunks")
        chunks = [list(ids[i * n_ctx : (i + 1) * n_ctx]) for i in range(n if n_max is None else min(n, n_max))]
        return chunks if self.bos is None else [[self.bos, *chunk[1:]] for chunk in chunks]

    def prompt(self, source: Any, question: str) -> Prompt:
        """The tokens around a picture and its question, through the chat template.

        Raises: UnsupportedInputError when template or vocabulary have no place for a picture.
        """
        llm = self.llm
        blank = Image(np.zeros((56, 56, 3), np.uint8))  # the text around a picture is the same for all of them
        content = [{"type": "image", "image": blank}, {"type": "text", "text": question}]
        text = llm.apply_template([{"role": "user", "content": content}])
        before, found, behind = text.partition(llm.media_marker())
        if not found or not behind:
            raise UnsupportedInputError(
                f"{llm.model_path}: its chat template has no place for a picture before the question"
            )
        start, end = [], []
        if self._is_ernie:  # START and END are part of the medium, and the template's label stands before it
            before = before if before.endswith(LABEL) else before + LABEL
        else:
            if self._marker is None:
                raise UnsupportedInputError(f"{llm.model_path}: no marker for pictures in its vocabulary")
            start, end = [self._marker.start], [self._marker.end]
        return Prompt(
            source,
            (*llm.tokenize(before, add_bos=True, special=True), *start),
            (*end, *llm.tokenize(behind, add_bos=False, special=True)),
        )

    def set_tensor(self, name: str, data: np.ndarray) -> None:
        """Overwrite a tensor of a model that was loaded without mapping. Shapes: (n_bytes,) uint8."""
        _core.set_tensor_data(self.llm.engine, name, data)

    def clear(self) -> None:
        """Forget all tokens."""
        self.session.clear()

    def rows(self, ids: Sequence[int], position: int) -> np.ndarray:
        """Logits of further tokens. Shapes: (n,) -> (n, n_vocab) float32."""
        logits: np.ndarray = self._call(self.session.decode_tokens, np.asarray(ids, np.int32), position)
        if not np.isfinite(logits).all():
            raise PyllamaernieError(f"{self.header.path}: logits that are not finite at token {position}")
        return logits

    def tokenize_picture(self, prompt: Prompt) -> _core.MediaChunk:
        """The picture as the projector takes it. Raises: InputError when it and its question are too long."""
        chunk: _core.MediaChunk = self._call(self.session.tokenize_image, self.llm.load_image(prompt.source).rgb)
        needed = len(prompt.before) + chunk.n_tokens + len(prompt.behind) + N_ANSWER + 2
        if needed > self.session.n_ctx:
            raise InputError(f"a picture and its question take {needed} tokens, the context holds {self.session.n_ctx}")
        return chunk

    def encode(self, chunk: _core.MediaChunk) -> np.ndarray:
        """A picture through the projector. Shapes: -> (n_tokens, n_embd) float32."""
        embd: np.ndarray = self._call(self.session.encode, chunk)
        return embd

    def start(self, prompt: Prompt) -> int:
        """Decode a prompt up to and including its picture; the position behind it."""
        chunk = self.tokenize_picture(prompt)
        return self.start_encoded(prompt, chunk, self.encode(chunk))

    def start_encoded(self, prompt: Prompt, chunk: _core.MediaChunk, embd: np.ndarray) -> int:
        """The same with a picture that `encode` has been through."""
        self.clear()
        self.rows(prompt.before, 0)
        self._call(self.session.decode_media, chunk, embd, len(prompt.before))
        return len(prompt.before) + int(chunk.n_pos)

    def answer(self, prompt: Prompt) -> list[int]:
        """The likeliest answer, without its end token, at most N_ANSWER tokens."""
        ends = {self.llm.token_eos(), self.llm.token_eot()}
        position = self.start(prompt)
        ids = list(prompt.behind)
        answer: list[int] = []
        while len(answer) < N_ANSWER:
            last = int(self.rows(ids, position)[-1].argmax())
            if last in ends:
                break
            answer.append(last)
            position += len(ids)
            ids = [last]
        return answer

    def speed(self, prompt: Sequence[int]) -> tuple[float, float]:
        """Tokens per second of prefill and decode of one request to the engine."""
        body = {"prompt": list(prompt), "n_predict": N_DECODE + 1, "temperature": 0, "ignore_eos": True}
        timings = self.llm.request("completions", {**body, "cache_prompt": False})["timings"]
        # the first token comes from the prompt's last row
        return timings["prompt_per_second"], (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1000
