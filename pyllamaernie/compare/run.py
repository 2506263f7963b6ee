"""Running files side by side on the same rows, for `compare`: contexts, groups that fit into memory, lockstep.

Every piece of at most N_ROWS rows of the reference is compared with that of each other file and dropped, so no logits
reach the disk and memory does not grow with the text or the context.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from pyllamaernie.compare.divergence import Rows, kl_rows, nll_rows
from pyllamaernie.compare.model import N_CTX_PICTURES, N_DECODE, N_PREFILL, Model, Prompt
from pyllamaernie.compare.table import Compared, ComparisonTable
from pyllamaernie.compare.vocabulary import Vocabulary, check_tokens, read_vocabulary
from pyllamaernie.errors import UnsupportedInputError
from pyllamaernie.gguf.header import Header, read_header
from pyllamaernie.gguf.projector import find_projector
from pyllamaernie.machine import free_memory_bytes

N_ROWS = 512  # logits of at most this many rows exist at a time, of the reference and of one other file
MEMORY_SHARE = 0.8  # of the free memory, for the files that run side by side


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
        self.prompts: list[Prompt] = []
        self.chunks: list[list[int]] = []
        self.vocabulary: Vocabulary | None = None

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

    def _open(self, i: int) -> Model:
        header, mmproj = self.headers[i], None
        if self.pictures:
            first = find_projector(self.headers[0], self.mmproj)
            if first is None:
                raise UnsupportedInputError(
                    f"{self.headers[0].path} has no projector, so it takes no pictures; give its mmproj file"
                )
            mmproj = (find_projector(header, self.mmproj) or first).path
        n_ctx = max(self.n_ctx, N_CTX_PICTURES if self.pictures else 0)
        return Model(header, mmproj, self.n_threads, n_ctx, speed=self.speed_runs > 0)

    def _learn(self, i: int, model: Model) -> None:
        """Vocabulary, chunks and prompts from the reference; the others are checked against them."""
        if i == 0 and self.vocabulary is not None:
            return
        found = read_vocabulary(model.llm, self.words)
        if i:
            assert self.vocabulary is not None
            check_tokens(self.vocabulary, found)
            return
        self.vocabulary = found
        if found.ids is not None:
            self.chunks = model.chunks(found.ids, self.n_ctx, self.n_chunks_max)
        self.prompts = [model.prompt(source, question) for source, question in self.pictures]

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

    def _run_chunk(self, number: int, ids: Sequence[int], side: Sequence[tuple[int, Model]], again: bool) -> None:
        """Count the rows from the middle on, but for the last one: the token behind it is not in the chunk."""
        first, last = self.n_ctx // 2, self.n_ctx - 1
        for _, model in side:
            model.clear()
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

    def _run_prompt(self, number: int, side: Sequence[tuple[int, Model]], again: bool) -> None:
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

    def _time(self, side: Sequence[tuple[int, Model]]) -> None:
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
