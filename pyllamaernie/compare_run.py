"""Running files side by side on the same rows, for `compare`: contexts, groups that fit into memory, lockstep.

Every piece of at most N_ROWS rows of the reference is compared with that of each other file and dropped, so no logits
reach the disk and memory does not grow with the text or the context.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from pyllamaernie import _core, _log
from pyllamaernie.compare_table import N_ANSWER, Compared, ComparisonTable
from pyllamaernie.divergence import Rows, kl_rows, nll_rows
from pyllamaernie.errors import DecodeError, InputError, PyllamaernieError, UnsupportedInputError
from pyllamaernie.llama import Llama
from pyllamaernie.media import Image
from pyllamaernie.model import ERNIE_PROJECTOR, Header, find_markers, find_projector, free_memory_bytes, read_header

N_ROWS = 512  # logits of at most this many rows exist at a time, of the reference and of one other file
N_CTX_PICTURES = 8192  # the longest prompt with a picture
N_PREFILL, N_DECODE = 512, 32  # tokens of one timed request
MEMORY_SHARE = 0.8  # of the free memory, for the files that run side by side
LABEL = "Picture 1:"  # mtmd adds it for ERNIE where the text has none: native/overlay/tools/mtmd/pyllamaernie-mtmd.inc
SAME = "only files with the same vocabulary can be compared"


# ---- the models


class _Model:
    """A file with a context of its own for exact rows; the engine's context is only for timing."""

    def __init__(
        self, header: Header, mmproj: Any, n_threads: int | None, n_ctx: int, *, speed: bool, use_mmap: bool = True
    ) -> None:
        n_engine = min(N_PREFILL + N_DECODE if speed else 1, int(header.get("context_length") or N_PREFILL))
        self.header = header
        self.llm: Llama = Llama(
            header.path, mmproj=mmproj, n_threads=n_threads, n_ctx=max(n_engine, 64), use_mmap=use_mmap
        )
        try:
            info = self.llm._info
            self.n_ctx_train = int(info["n_ctx_train"])
            options = {**self.llm._scorer_options, "n_ctx": min(n_ctx, self.n_ctx_train), "trace": False}
            self.session = self.call(lambda: _core.Session(self.llm._engine, **options))
            self.marker = next((m for m in find_markers(self.llm._engine) if m.kind == "image"), None)
            projector = self.llm._projector
            self.is_ernie = projector is not None and projector.metadata.get("clip.projector_type") == ERNIE_PROJECTOR
            if projector is not None:
                threads, gpu = options["n_threads"], bool(_core.gpu_devices(False))
                self.call(self.session.load_projector, os.fspath(projector.path), threads, gpu)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        session = getattr(self, "session", None)
        if session is not None:
            session.close()
        self.llm.close()

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, function: Any, *args: Any) -> Any:
        try:
            return function(*args)
        except (RuntimeError, ValueError) as error:
            reason = next(iter(_log.drain()[-1:]), "")
            raise DecodeError(f"{self.header.path}: {error}{': ' + reason if reason else ''}") from None

    def rows(self, ids: Sequence[int], position: int) -> np.ndarray:
        """Logits of further tokens. Shapes: (n,) -> (n, n_vocab) float32."""
        logits = self.call(self.session.decode_tokens, np.asarray(ids, np.int32), position)
        if not np.isfinite(logits).all():
            raise PyllamaernieError(f"{self.header.path}: logits that are not finite at token {position}")
        return logits

    def start(self, prompt: _Prompt) -> int:
        """Decode a prompt up to and including its picture; the position behind it."""
        self.session.clear()
        chunk = self.call(self.session.tokenize_image, self.llm._image(prompt.source).rgb)
        needed = len(prompt.before) + chunk.n_tokens + len(prompt.behind) + N_ANSWER + 2
        if needed > self.session.n_ctx:
            raise InputError(f"a picture and its question take {needed} tokens, the context holds {self.session.n_ctx}")
        embd = self.call(self.session.encode, chunk)
        self.rows(prompt.before, 0)
        self.call(self.session.decode_media, chunk, embd, len(prompt.before))
        return len(prompt.before) + chunk.n_pos

    def answer(self, prompt: _Prompt) -> list[int]:
        """The likeliest answer, without its end token, at most N_ANSWER tokens."""
        ends = {int(self.llm._info[name]) for name in ("token_eos", "token_eot")}
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
        timings = self.llm._request("completions", {**body, "cache_prompt": False})["timings"]
        # the first token comes from the prompt's last row
        return timings["prompt_per_second"], (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1000


@dataclass(frozen=True)
class _Prompt:
    """Token ids before and behind a picture, as the engine makes them; `answer` is what the reference says."""

    source: Any  # what `Image.of` takes
    before: tuple[int, ...]
    behind: tuple[int, ...]
    answer: tuple[int, ...] = ()


def _prompt(model: _Model, source: Any, question: str) -> _Prompt:
    llm = model.llm
    blank = Image(np.zeros((56, 56, 3), np.uint8))  # the text around a picture is the same for all of them
    content = [{"type": "image", "image": blank}, {"type": "text", "text": question}]
    text = llm.apply_template([{"role": "user", "content": content}])
    before, found, behind = text.partition(llm._props["media_marker"])
    if not found or not behind:
        raise UnsupportedInputError(
            f"{llm.model_path}: its chat template has no place for a picture before the question"
        )
    start, end = [], []
    if model.is_ernie:  # START and END are part of the medium, and the template's label stands before it
        before = before if before.endswith(LABEL) else before + LABEL
    else:
        if model.marker is None:
            raise UnsupportedInputError(f"{llm.model_path}: no marker for pictures in its vocabulary")
        start, end = [model.marker.start], [model.marker.end]
    return _Prompt(
        source,
        (*llm.tokenize(before, add_bos=True, special=True), *start),
        (*end, *llm.tokenize(behind, add_bos=False, special=True)),
    )


# ---- one vocabulary


def check_vocabulary(reference: Header, other: Header) -> None:
    for key in ("tokenizer.ggml.model", "tokenizer.ggml.tokens"):
        ours, theirs = (h.metadata.get(key) for h in (reference, other))
        if ours != theirs:
            what = "tokens" if key.endswith("tokens") else "as its tokenizer"
            raise InputError(f"{reference.path} has {ours} {what}, {other.path} has {theirs}: {SAME}")


def _pieces(llm: Llama) -> list[bytes]:
    return [llm.detokenize([i], special=True) for i in range(llm.n_vocab())]


def _check_pieces(reference: _Facts, other: Llama, words: str | None) -> None:
    """Raise InputError for the first token that differs, in the vocabulary or in how the text is cut."""
    pieces = _pieces(other)
    ids = None if words is None else other.tokenize(words, add_bos=True)
    if len(pieces) != len(reference.pieces):
        raise InputError(
            f"{reference.path} has {len(reference.pieces)} tokens, {other.model_path} has {len(pieces)}: {SAME}"
        )
    bad = next((i for i, (a, b) in enumerate(zip(reference.pieces, pieces, strict=True)) if a != b), None)
    if bad is not None:
        raise InputError(
            f"token {bad} is {reference.pieces[bad]!r} in {reference.path} and {pieces[bad]!r} in "
            f"{other.model_path}: {SAME}"
        )
    if ids != reference.ids:
        raise InputError(f"{reference.path} and {other.model_path} cut the text into different tokens: {SAME}")


@dataclass(frozen=True)
class _Facts:
    """What the other files are checked against."""

    path: str
    pieces: list[bytes]
    ids: list[int] | None
    bos: int | None  # what each chunk begins with


# ---- the run


class Run:
    """One comparison: groups of files that fit side by side, chunk after chunk in lockstep."""

    def __init__(
        self,
        headers: Sequence[Header],
        words: str | None,
        pictures: Sequence[tuple[Any, str]],
        *,
        n_ctx: int,
        n_chunks: int | None,
        mmproj: Any,
        n_threads: int | None,
    ) -> None:
        self.headers, self.words, self.pictures = headers, words, pictures
        self.n_ctx, self.n_chunks_max, self.mmproj, self.n_threads = n_ctx, n_chunks, mmproj, n_threads
        self.speed_runs = 0
        self.text = [Rows() for _ in headers]
        self.media = [Rows() for _ in headers]
        self.same_answers: list[list[bool]] = [[] for _ in headers]
        self.speeds: list[list[tuple[float, float]]] = [[] for _ in headers]
        self.prompts: list[_Prompt] = []
        self.chunks: list[list[int]] = []
        self.facts: _Facts | None = None

    def table(self, speed_runs: int, progress: bool) -> ComparisonTable:
        """Run everything; timing takes `speed_runs` rounds."""
        self.speed_runs = speed_runs
        groups = _groups([sum(part.path.stat().st_size for part in _parts(header)) for header in self.headers])
        if len(groups) > 1:  # hours of work should not end at a file that never could be compared
            for i in range(len(self.headers)):
                with self._open(i) as model:
                    self._learn(i, model)
        with tqdm(unit="chunk", disable=not progress, file=sys.stderr) as bar:
            for n, group in enumerate(groups):
                self._run_group(group, len(groups), n > 0, bar)
        compared = [self._compared(i) for i in range(len(self.headers))]
        return ComparisonTable(tuple(compared), self.n_ctx, len(self.chunks), len(self.prompts))

    def _open(self, i: int) -> _Model:
        header, mmproj = self.headers[i], None
        if self.pictures:
            first = find_projector(self.headers[0], self.mmproj)
            if first is None:
                raise UnsupportedInputError(
                    f"{self.headers[0].path} has no projector, so it takes no pictures; give its mmproj file"
                )
            mmproj = (find_projector(header, self.mmproj) or first).path
        n_ctx = max(self.n_ctx, N_CTX_PICTURES if self.pictures else 0)
        return _Model(header, mmproj, self.n_threads, n_ctx, speed=self.speed_runs > 0)

    def _learn(self, i: int, model: _Model) -> None:
        """Vocabulary, chunks and prompts from the reference; the others are checked against them."""
        if i:
            assert self.facts is not None
            _check_pieces(self.facts, model.llm, self.words)
            return
        if self.facts is not None:
            return
        llm = model.llm
        ids = None if self.words is None else llm.tokenize(self.words, add_bos=True)
        bos = llm.token_bos() if llm._info["add_bos"] else None
        self.facts = _Facts(llm.model_path, _pieces(llm), ids, bos)
        if ids is not None:
            self.chunks = _chunks(ids, self.n_ctx, self.n_chunks_max, model.n_ctx_train, bos)
        self.prompts = [_prompt(model, source, question) for source, question in self.pictures]

    def _run_group(self, group: Sequence[int], n_groups: int, again: bool, bar: Any) -> None:
        """All chunks and pictures through the files of a group; `again`: the reference has been counted before."""
        with ExitStack() as stack:
            models = []
            for i in group:
                models.append(stack.enter_context(self._open(i)))
                self._learn(i, models[-1])
            side = list(zip(group, models, strict=True))
            bar.total = n_groups * (len(self.chunks) + len(self.prompts))
            bar.refresh()
            for number, chunk in enumerate(self.chunks):
                self._run_chunk(number, chunk, side, again)
                bar.update()
            for number in range(len(self.prompts)):
                self._run_prompt(number, side, again)
                bar.update()
            self._time(side)

    def _run_chunk(self, number: int, ids: Sequence[int], side: Sequence[tuple[int, _Model]], again: bool) -> None:
        """Count the rows from the middle on, but for the last one: the token behind it is not in the chunk."""
        first, last = self.n_ctx // 2, self.n_ctx - 1
        for _, model in side:
            model.session.clear()
        for begin in range(0, len(ids), N_ROWS):
            piece = ids[begin : begin + N_ROWS]
            a, b = max(first - begin, 0), min(last - begin, len(piece))
            reference = None
            for i, model in side:
                logits = model.rows(piece, begin)[a : max(a, b)]
                reference = logits if reference is None else reference
                if len(logits) and not (i == 0 and again):
                    self.text[i].add(number, *_against(reference, logits, i))
                    self.text[i].nll.append(nll_rows(logits, ids[begin + a + 1 : begin + b + 1]))

    def _run_prompt(self, number: int, side: Sequence[tuple[int, _Model]], again: bool) -> None:
        """Count the rows behind the picture, then those of the reference's answer, which all files follow."""
        prompt = self.prompts[number]
        if not again:
            prompt = self.prompts[number] = replace(prompt, answer=tuple(side[0][1].answer(prompt)))
        reference = None
        for i, model in side:
            logits = model.rows([*prompt.behind, *prompt.answer], model.start(prompt))
            reference = logits if reference is None else reference
            if not (i == 0 and again):
                kl, same = _against(reference, logits, i)
                self.media[i].add(number, kl, same)
                self.same_answers[i].append(bool(same[len(prompt.behind) - 1 :].all()))

    def _time(self, side: Sequence[tuple[int, _Model]]) -> None:
        """Rounds over all files, so that a busy moment of the machine hits none of them alone; one round to warm up."""
        prompt = self.chunks[0] if self.chunks else [*self.prompts[0].before, *self.prompts[0].behind]
        for turn in range(self.speed_runs + 1 if self.speed_runs else 0):
            for i, model in side:
                n = min(N_PREFILL, model.llm.n_ctx() - N_DECODE - 1)
                speed = model.speed((list(prompt) * math.ceil(n / len(prompt)))[:n])
                if turn:
                    self.speeds[i].append(speed)

    def _compared(self, i: int) -> Compared:
        header, text, media = self.headers[i], self.text[i], self.media[i]
        parts = _parts(header)
        tensors = [tensor for part in parts for tensor in part.tensors]
        n_values = sum(math.prod(tensor[1]) for tensor in tensors)
        perplexity, error = text.perplexity() if self.chunks else (None, None)
        same, speeds = self.same_answers[i], self.speeds[i]
        return Compared(
            path=str(header.path),
            size_bytes=sum(part.path.stat().st_size for part in parts),
            bpw=sum(tensor[4] for tensor in tensors) * 8 / n_values,
            perplexity=perplexity,
            perplexity_error=error,
            text=text.divergence() if self.chunks else None,
            pictures=media.divergence() if self.prompts else None,
            same_answers=sum(same) / len(same) if same else None,
            prefill_tps=statistics.median(s[0] for s in speeds) if speeds else None,
            decode_tps=statistics.median(s[1] for s in speeds) if speeds else None,
        )


def _parts(header: Header) -> list[Header]:
    """All files of a model: upstream splits big ones into NAME-00001-of-00003.gguf and so on."""
    n = int(header.metadata.get("split.count") or 1)
    stem, found, _ = header.path.name.rpartition("-00001-of-")
    if n == 1 or not found:
        return [header]
    return [read_header(header.path.with_name(f"{stem}-{i:05d}-of-{n:05d}.gguf")) for i in range(1, n + 1)]


def _against(reference: np.ndarray, logits: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """KL and same top of each row; the reference (file 0) is not computed against itself."""
    return (np.zeros(len(logits)), np.ones(len(logits), bool)) if i == 0 else kl_rows(reference, logits)


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """The reference with as many others as memory holds at once, by the sizes of the files; at least one other."""
    budget = free_memory_bytes() * MEMORY_SHARE
    groups: list[list[int]] = []
    for i in range(1, len(sizes)):
        if not groups or sizes[0] + sum(sizes[j] for j in groups[-1][1:]) + sizes[i] > budget:
            groups.append([0])
        groups[-1].append(i)
    return groups


def _chunks(ids: Sequence[int], n_ctx: int, n_max: int | None, n_train: int, bos: int | None) -> list[list[int]]:
    """The text in chunks of n_ctx tokens, each begun by BOS where the model wants one, in place of its first token."""
    if n_ctx > n_train:
        raise InputError(f"chunks of {n_ctx} tokens, but the model was trained for {n_train}; use smaller ones")
    n = len(ids) // n_ctx
    if n == 0:
        raise InputError(f"the text has {len(ids)} tokens, a chunk takes {n_ctx}; give more text or smaller chunks")
    chunks = [list(ids[i * n_ctx : (i + 1) * n_ctx]) for i in range(n if n_max is None else min(n, n_max))]
    return chunks if bos is None else [[bos, *chunk[1:]] for chunk in chunks]
