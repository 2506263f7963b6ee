"""From stored tensors to output tensors: which rows go where, in which type, and the block-wise conversion.

A family asks a `Pool` for the tensors that its configuration implies; what it asked for in vain, got in another shape,
or left behind is reported together, by name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllamaernie.convert.checkpoint import FLOAT_TYPES, StoredTensor
from pyllamaernie.errors import ConvertError, TensorMappingError
from pyllamaernie.gguf.file import OutTensor, TensorType, block_size
from pyllamaernie.quant.codec import encode_rows

log = logging.getLogger("pyllamaernie.convert")

_BLOCK_BYTES = 16 * 2**20  # of float32; several copies of a block live while it is encoded
_RAW = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
# how the bits of a value are read, and its exponent when it is infinite or NaN
FLOATS: dict[TensorType, tuple[type[np.unsignedinteger[Any]], int]] = {
    TensorType.F32: (np.uint32, 0x7F800000),
    TensorType.F16: (np.uint16, 0x7C00),
    TensorType.BF16: (np.uint16, 0x7F80),
}
_ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_vl.weight", "rope_freqs.weight")


@dataclass(frozen=True)
class Rows:
    """A range of rows of a stored tensor. With `order`, row j of each run of that length is its row `order[j]`."""

    tensor: StoredTensor
    start: int
    stop: int
    order: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def n_rows(self) -> int:
        return self.tensor.n_cols if self.transposed else self.stop - self.start

    def part(self, start: int, stop: int) -> Rows:
        """A sub-range, counted from this range's first row."""
        return replace(self, start=self.start + start, stop=self.start + stop)

    def permuted(self, order: Sequence[int]) -> Rows:
        return replace(self, order=tuple(int(i) for i in order))

    def blocks(self, raw: str | None) -> Iterator[np.ndarray]:
        """The rows in order, a few at a time: in the stored type if that is `raw`, as float32 otherwise."""
        read = self.tensor.rows if raw == self.tensor.dtype else self.tensor.rows_f32
        if self.transposed:  # routers only, which are small
            yield np.ascontiguousarray(read(self.start, self.stop).T)
            return
        step = max(1, _BLOCK_BYTES // (4 * self.tensor.n_cols))
        if self.order:
            step = max(1, step // len(self.order)) * len(self.order)
        for start in range(self.start, self.stop, step):
            block = read(start, min(start + step, self.stop))
            if self.order:
                block = block.reshape(-1, len(self.order), block.shape[1])[:, list(self.order), :].reshape(block.shape)
            yield block


class Pool:
    """The tensors of a checkpoint under canonical names; remembers every disagreement until `finish`."""

    def __init__(self, tensors: dict[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._left = set(tensors)
        self._missing: list[str] = []
        self._odd: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def drop(self, pattern: re.Pattern[str]) -> list[str]:
        """Takes out, and names, the tensors that match."""
        found = sorted(name for name in self._tensors if pattern.search(name))
        for name in found:
            del self._tensors[name]
            self._left.discard(name)
        return found

    def numbers(self, pattern: re.Pattern[str]) -> frozenset[int] | None:
        """Which numbers the first group has in the names that match, such as those of layers; None if nobody knows."""
        return frozenset(int(found[1]) for found in map(pattern.match, self._tensors) if found)

    def take(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] = FLOAT_TYPES) -> Rows | None:
        """All rows of a tensor that must have this shape; None, and an entry for `finish`, when it is not so."""
        tensor = self._tensors.get(name)
        if tensor is None:
            self._missing.append(name)
            return None
        self._left.discard(name)
        if tensor.dtype not in dtypes:
            self._odd.append(f"{tensor.name} is {tensor.dtype}, expected one of {', '.join(dtypes)}")
        elif tensor.shape != shape:
            hint = ""
            if len(shape) == 2 and tensor.shape == shape[::-1]:
                advice = ": Paddle stores matrices as [in, out]; convert the -PT variant of the model"
                hint = f" (transposed{advice if dtypes is FLOAT_TYPES else ''})"
            self._odd.append(f"{tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}{hint}")
        else:
            seen = replace(tensor, shape=(*shape, 1)) if len(shape) == 1 else tensor  # a vector is a column of rows
            return Rows(seen, 0, seen.n_rows)
        return None

    def take_split(
        self, fused: str, names: Sequence[str], rows: Sequence[int], tail: tuple[int, ...]
    ) -> list[Rows | None]:
        """Tensors that may be stored as one, stacked along the rows; `tail` is () for biases."""
        if fused not in self:
            return [self.take(name, (n, *tail)) for name, n in zip(names, rows, strict=True)]
        whole = self.take(fused, (sum(rows), *tail))
        if whole is None:
            return [None] * len(rows)
        ends = np.cumsum(rows)
        return [whole.part(int(end) - n, int(end)) for end, n in zip(ends, rows, strict=True)]

    def finish(self) -> None:
        """Raises TensorMappingError naming what is missing, odd or unknown (five of each)."""
        problems = []
        for what, names in (
            ("missing", list(dict.fromkeys(self._missing))),
            ("unusable", self._odd),
            ("unknown", [self._tensors[n].name for n in sorted(self._left)]),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                problems.append(f"{len(names)} {what}: {'; '.join(names[:5])}{more}")
        if problems:
            raise TensorMappingError("the tensors do not match config.json: " + " | ".join(problems))


class ImpliedPool(Pool):
    """For a dry run without weights: every tensor has the shape that is asked for.

    Which ones there are is known from `names`; without names it is what must be there, and what `optional` says of the
    rest.
    """

    def __init__(self, names: Iterable[str] | None, optional: Callable[[str], bool], dtype: str) -> None:
        self._known = None if names is None else frozenset(names)
        self._optional, self._dtype = optional, dtype
        super().__init__({name: self._stored(name, (0, 0)) for name in self._known or ()})

    def __contains__(self, name: str) -> bool:
        return self._optional(name) if self._known is None else name in self._known

    def numbers(self, pattern: re.Pattern[str]) -> frozenset[int] | None:
        return None if self._known is None else super().numbers(pattern)

    def drop(self, pattern: re.Pattern[str]) -> list[str]:
        before = self._optional
        self._optional = lambda name: before(name) and not pattern.search(name)
        self._known = self._known and frozenset(n for n in self._known if not pattern.search(n))
        return super().drop(pattern)

    def take(self, name: str, shape: tuple[int, ...], dtypes: Sequence[str] = FLOAT_TYPES) -> Rows | None:
        if self._known is None or name in self._known:
            self._tensors[name] = self._stored(name, shape)
        return super().take(name, shape, dtypes)

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(name, Path(), self._dtype, shape, 0)


def tensor_type(name: str, shape: tuple[int, ...], wanted: TensorType) -> TensorType:
    """The type that a tensor gets when the file is to be `wanted`.

    Source: llama.cpp `conversion/base.py` `ModelBase.prepare_tensors` at the pin, whose result ours must equal.
    """
    if len(shape) <= 1 or name.endswith(("_norm.weight", *_ALWAYS_F32)) or not name.endswith(".weight"):
        return TensorType.F32
    if name == "v.patch_embd.weight":
        return TensorType.F16 if wanted == TensorType.F16 else TensorType.F32
    if shape[-1] % block_size(wanted):
        log.warning(
            "%s: rows of %d values do not divide into blocks of %s; stored as F16", name, shape[-1], wanted.name
        )
        return TensorType.F16
    return wanted


def out_tensor(name: str, pieces: Sequence[Rows | None], shape: tuple[int, ...], wanted: TensorType) -> OutTensor:
    """An output tensor made of row ranges, one after the other. Missing pieces are allowed until `Pool.finish`."""
    kind = tensor_type(name, shape, wanted)
    raw = next((stored for stored, t in _RAW.items() if t == kind), None)

    def blocks() -> Iterator[np.ndarray]:
        at = 0
        for piece in pieces:
            if piece is None:
                raise AssertionError(f"{name}: written although a part of it is missing")
            for block in piece.blocks(raw):
                same = piece.tensor.dtype == raw
                if not same and kind not in FLOATS:
                    check_finite(name, shape, kind, block, at)
                at += block.size
                yield block if same else _encode(name, block.reshape(-1, shape[-1]) if len(shape) > 1 else block, kind)

    return OutTensor(name, shape, kind, blocks)


def check_finite(name: str, shape: tuple[int, ...], kind: TensorType, block: np.ndarray, first: int) -> None:
    """Raises ConvertError naming the first value of a block that is NaN or infinite.

    `first`: which value of the tensor the block begins with. Blocks of a quantized type are looked at
    as the float32 that they are made of.
    """
    word, exponent = FLOATS.get(kind, FLOATS[TensorType.F32])
    bits = np.bitwise_and(block.view(word), np.iinfo(word).max >> 1)  # without the sign
    if bits.size == 0 or bits.max() < exponent:
        return
    at = int(np.argmax(bits.ravel() >= exponent))
    index = [int(i) for i in np.unravel_index(first + at, shape)]
    what = "infinite" if bits.ravel()[at] == exponent else "not a number"
    raise ConvertError(f"{name}: the value at {index} is {what}; a network cannot compute with it, download it again")


def computed_tensor(name: str, data: np.ndarray) -> OutTensor:
    """A small float32 tensor that is in no file."""
    return OutTensor(name, data.shape, TensorType.F32, lambda: iter([data.astype("<f4")]))


def _encode(name: str, rows: np.ndarray, kind: TensorType) -> np.ndarray:
    if kind != TensorType.F16:
        return encode_rows(rows, kind)
    with np.errstate(over="ignore"):
        out = encode_rows(rows, kind)
    if np.isinf(out).any() and not np.isinf(rows).any():
        raise ConvertError(
            f"{name}: largest value {np.abs(rows).max():.6g} is beyond F16's 65504; use type bf16 or f32"
        )
    return out
