"""What coarser weights do to a model's output: types tried in place, in the memory of the loaded model.

The model is loaded once in F32, F16 or BF16, without mapping. Tensors are overwritten with what is left of them after
a type's encoder and decoder, the text and the pictures run again, and the mean KL to the exact model is what the type
costs. Activations stay exact, so a file of the same types loses a little more (about what Q8_0 loses).

Encoding a whole model takes hours in some types. For those the weights that a fast type of nearly the same error leaves
are used, moved towards or away from the exact ones until the error is that of the type.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pyllamaernie.compare.divergence import kl_rows
from pyllamaernie.compare.model import N_CTX_PICTURES, Model, Prompt
from pyllamaernie.compare.samples import read_text
from pyllamaernie.errors import InputError
from pyllamaernie.gguf.header import read_header
from pyllamaernie.gguf.projector import find_projector
from pyllamaernie.machine import free_memory_bytes, n_cpu
from pyllamaernie.plan.measure import ErrorTable
from pyllamaernie.quant import native
from pyllamaernie.quant.importance import Importance
from pyllamaernie.quant.source import ModelSource, Weights

N_CTX = 512
N_CHUNKS = 16
N_LOGITS = 2**28  # of the reference are kept: 1 GiB; with more rows than that, evenly chosen ones
# With fast encoders: below 0.6 us per weight (bench/quantize_throughput.py). The others are imitated by the nearest.
FAST_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}) | {
    *("Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32")
}
N_MEDIA_BYTES = 2**29  # of encoded pictures are kept; those beyond are encoded for every run
CACHE_SHARE = 0.25  # of the free memory, for decoded weights that may be wanted again


class Probe:
    """A model whose tensors can be given other types. Use it as a context manager, or call `close()`.

    `text` is a UTF-8 file, `pictures` holds (picture, question) pairs; at least one of both. `errors`: slow types are
    imitated where it knows their error.
    Raises: InputError; the load errors of `Llama`.
    """

    def __init__(
        self,
        source: ModelSource,
        importance: Importance | None,
        text: str | os.PathLike[str] | None,
        *,
        pictures: Sequence[tuple[Any, str]] = (),
        mmproj: str | os.PathLike[str] | None = "auto",
        n_chunks: int = N_CHUNKS,
        n_threads: int | None = None,
        errors: ErrorTable | None = None,
    ) -> None:
        if text is None and not pictures:
            raise InputError("nothing to probe with: give a text, pictures, or both")
        self.weights: dict[str, Weights] = {w.name: w for w in source.weights}
        self.importance, self.errors = importance, errors
        self.types: dict[str, str] = {}  # what differs from the exact model
        self.n_runs = 0
        self.n_threads = n_threads or n_cpu()
        self._cache: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._media: dict[int, tuple[Any, np.ndarray]] = {}  # preprocessed and encoded pictures by their number
        self._cache_bytes = int(free_memory_bytes() * CACHE_SHARE)
        header = read_header(source.path)
        projector = find_projector(header, mmproj) if pictures else None
        if pictures and projector is None:
            raise InputError(f"{source.path} has no projector, so it takes no pictures; give its mmproj file")
        self.model = Model(
            header,
            None if projector is None else projector.path,
            n_threads,
            max(N_CTX, N_CTX_PICTURES if pictures else 0),
            speed=False,
            use_mmap=False,
        )
        try:
            self.chunks: list[list[int]] = []
            if text is not None:
                ids = self.model.llm.tokenize(read_text(Path(text)), add_bos=True)
                self.chunks = self.model.chunks(ids, min(N_CTX, self.model.n_ctx_train), n_chunks)
            prompts = [self.model.prompt(picture, question) for picture, question in pictures]
            self.prompts = [(prompt, self.model.answer(prompt)) for prompt in prompts]
            self.reference = self._logits(keep=None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.model.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def kl(self, n_chunks: int | None = None) -> float:
        """Mean KL to the exact model over the rows of the first chunks and all pictures, in nats."""
        sums, rows = self.kl_parts(n_chunks)
        return float(sums.sum() / rows.sum())

    def kl_parts(self, n_chunks: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum of the KL and number of rows of each chunk and picture. Shapes: -> (n_parts,) twice."""
        found = self._logits(keep=self.reference, n_chunks=n_chunks)
        return np.array([kl.sum() for kl in found]), np.array([len(kl) for kl in found])

    def _logits(self, keep: list[np.ndarray] | None, n_chunks: int | None = None) -> list[np.ndarray]:
        """Logits of every part, or with `keep`, those of the exact model, the KL of each row to them."""
        self.n_runs += 1
        n_vocab = self.model.llm.n_vocab()
        n_rows = sum(map(len, self.chunks)) + sum(len(p.behind) + len(answer) for p, answer in self.prompts)
        step = -(-n_rows * n_vocab // N_LOGITS)
        out: list[np.ndarray] = []

        def count(logits: np.ndarray) -> None:
            logits = logits[::step]
            out.append(logits.copy() if keep is None else kl_rows(keep[len(out)], logits)[0])

        for chunk in self.chunks[:n_chunks]:
            self.model.clear()
            count(self.model.rows(chunk, 0)[:-1])
        if keep is not None and n_chunks is not None:
            out += [np.zeros(0)] * (len(self.chunks) - len(out))
        for number, (prompt, answer) in enumerate(self.prompts):
            count(self.model.rows([*prompt.behind, *answer], self._start(number, prompt)))
        return out

    def _start(self, number: int, prompt: Prompt) -> int:
        """Decode a prompt up to and including its picture, which is encoded once; the position behind it."""
        if number not in self._media:
            chunk = self.model.tokenize_picture(prompt)
            embd = self.model.encode(chunk)
            if sum(kept.nbytes for _, kept in self._media.values()) + embd.nbytes > N_MEDIA_BYTES:
                return self.model.start_encoded(prompt, chunk, embd)
            self._media[number] = chunk, embd
        return self.model.start_encoded(prompt, *self._media[number])

    def set_types(self, types: Mapping[str, str]) -> None:
        """Give tensors the weights that they would have in these types; the others stay as they are now."""
        for name, type_name in types.items():
            if self.types.get(name, self.weights[name].type) != type_name:
                self.model.set_tensor(name, self._decoded(name, type_name))
                self.types[name] = type_name

    def restore(self, names: Sequence[str] | None = None) -> None:
        """Give tensors, or all of them, their exact weights back."""
        for name in list(self.types) if names is None else names:
            if name in self.types:
                self.model.set_tensor(name, self._exact(name))
                del self.types[name]

    def _exact(self, name: str) -> np.ndarray:
        return np.concatenate([piece.load().ravel() for piece in self.weights[name].pieces()])

    def _decoded(self, name: str, type_name: str) -> np.ndarray:
        """A tensor after encoding and decoding, in the type that it is loaded in. Shapes: -> (n_bytes,) uint8"""
        weights, key = self.weights[name], (name, type_name)
        if type_name == weights.type:
            return self._exact(name)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        columns = None if self.importance is None else self.importance.columns.get(name)
        if columns is not None:
            columns = columns.reshape(weights.n_matrices, weights.n_cols)
        encoder, share = self._imitation(name, type_name)

        def one(part: tuple[int, np.ndarray]) -> np.ndarray:
            first_row, rows = part
            column = None if columns is None else columns[first_row // weights.rows_per_matrix]
            data = native.requantize(encoder, weights.type, rows, weights.n_cols, column, first_row)
            values = native.dequantize(encoder, data, weights.n_cols)
            if share != 1.0:
                exact = native.dequantize(weights.type, rows, weights.n_cols)
                values = exact + np.float32(share) * (values - exact)
            return native.quantize(weights.type, values).ravel()

        parts = [(piece.first_row + i, rows) for piece in weights.pieces() for i, rows in _halves(piece.load())]
        with ThreadPoolExecutor(self.n_threads) as pool:
            data = np.concatenate(list(pool.map(one, parts)))
        self._cache[key] = data
        while sum(x.nbytes for x in self._cache.values()) > self._cache_bytes and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return data

    def _imitation(self, name: str, type_name: str) -> tuple[str, float]:
        """The type to encode with, and by how much its error is scaled."""
        row = {} if self.errors is None else self.errors.errors.get(name, {})
        wanted = row.get(type_name)
        fast = {t: found.error for t, found in row.items() if t in FAST_TYPES and found.error > 0}
        if type_name in FAST_TYPES or wanted is None or not wanted.error > 0 or not fast:
            return type_name, 1.0
        nearest = min(fast, key=lambda t: (abs(math.log(fast[t] / wanted.error)), t))
        return nearest, math.sqrt(wanted.error / fast[nearest])


def _halves(rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Rows in two pieces, so that a tensor of one matrix keeps two threads busy."""
    middle = len(rows) // 2
    return [(0, rows[:middle]), (middle, rows[middle:])] if middle else [(0, rows)]
