"""Baidu's 2-bit releases (ERNIE-4.5-300B-A47B-2Bits-Paddle): their routed experts as CCQ2_B, nothing lost.

Everything else comes from the -PT release of the same model, since the other tensors of a 2-bit folder are stored for
the kernels of one GPU. Layout: what the loaders of PaddlePaddle/FastDeploy read (`fused_moe_wint2_backend.py`,
`ernie4_5_moe.py`, `load_weight_utils.py`, develop, 2025-09) and its `docs/quantization/wint2.md`; docs/ccq.md tells it.
No released file was at hand: `wint2_check` compares with the original before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllamaernie.convert.checkpoint import StoredTensor, read_config, read_tensors
from pyllamaernie.convert.ernie4_5 import N_LAYER_MAX, TextConfig, canonical_name
from pyllamaernie.convert.ernie4_5_moe import Bank, check_experts, sparse_layers
from pyllamaernie.convert.json_file import section, shown, whole
from pyllamaernie.convert.plan import Pool
from pyllamaernie.errors import ConvertError, MissingFileError, TensorMappingError
from pyllamaernie.gguf.file import Key, OutTensor, TensorType
from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant.ccq import baidu_weights, bf16_to_float32, decode_ccq2_b, encode_ccq2_b

TYPE = QUANT_TYPES["CCQ2_B"]
UP_GATE, DOWN = PROJECTIONS = ("up_gate_proj", "down_proj")
DOCUMENTED = "documented"

_BYTES, _BITS16, _FLOAT = ("I8", "U8"), ("BF16", "U16"), ("F32",)  # Paddle's numpy has bfloat16 as uint16
_SUPER = ("super_scales", "super_scale")  # the loader's spelling, the format note's
_EXPERT = re.compile(r"^model\.layers\.(\d{1,6})\.mlp\.experts\.")
_ONLY_2BIT = re.compile(r"\.(code_scale|code_zp|super_scales?)$")
_OUT = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight$")
_SAME = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("moe_num_experts", "moe_intermediate_size", "moe_layer_start_index", "moe_k", "vocab_size"),
)
_PER_ROW = ("code_scale", "code_zp", "super_bf16")
_ALL = ("q", "local", *_PER_ROW)  # the arrays of Codes
_CHECKED_STEP = 64  # every 64th channel is decoded again: 1.6 %


@dataclass(frozen=True)
class Codes:
    """The five tensors of one expert's projection, or of a piece of it; `name` is that of its codes in the file.

    Shapes: q (K/4, N), local (K/128, N) uint8; code_scale, code_zp (N,) float32; super_bf16 (N,) uint16.
    """

    name: str
    q: np.ndarray
    local: np.ndarray
    code_scale: np.ndarray
    code_zp: np.ndarray
    super_bf16: np.ndarray

    @property
    def n_cols(self) -> int:
        return 4 * int(self.q.shape[0])

    def part(self, channels: slice, start: int, stop: int) -> Codes:
        """Some output channels and the input columns start..stop, which are multiples of 128."""
        per_channel = (self.code_scale[channels], self.code_zp[channels], self.super_bf16[channels])
        return Codes(
            self.name, self.q[start // 4 : stop // 4, channels], self.local[start // 128 : stop // 128, channels],
            *per_channel,
        )  # fmt: skip

    def weights(self) -> np.ndarray:
        """What they stand for, in Hugging Face's order. Shapes: -> (N, K) float32."""
        return baidu_weights(self.q, self.local, self.code_scale, self.code_zp, bf16_to_float32(self.super_bf16)).T


def _low_first(codes: Codes, projection: str) -> Codes:
    return replace(codes, local=(codes.local >> 4) | (codes.local << 4))


def _up_first(codes: Codes, projection: str) -> Codes:
    if projection != UP_GATE:
        return codes
    half = codes.q.shape[1] // 2
    rolled: dict[str, Any] = {n: np.roll(getattr(codes, n), half, axis=-1) for n in _ALL}
    return replace(codes, **rolled)


def _signed(codes: Codes, projection: str) -> Codes:
    return replace(codes, q=codes.q ^ np.uint8(0x80))


def _by_channel(codes: Codes, projection: str) -> Codes:
    arrays = {"q": codes.q, "local": codes.local}
    turned: dict[str, Any] = {n: np.reshape(a, a.shape[::-1]).T for n, a in arrays.items()}
    return replace(codes, **turned)


def _tiled(codes: Codes, projection: str) -> Codes:
    n_rows, n = codes.q.shape
    if n_rows % 16 or n % 8:
        return codes
    tiles = np.reshape(codes.q, (n // 8, n_rows // 16, 8, 16))
    return replace(codes, q=tiles.transpose(1, 3, 0, 2).reshape(n_rows, n))


# name -> (what is otherwise than documented, how to undo it); of several, the last comes first: places before meanings
READINGS: dict[str, tuple[str, Callable[[Codes, str], Codes]]] = {
    "low-first": ("the local scale of an even group is in the low nibble", _low_first),
    "up-first": ("up_gate_proj holds up before gate", _up_first),
    "signed": ("codes are signed bytes, -128 the first", _signed),
    "by-channel": ("codes and local scales lie channel by channel", _by_channel),
    "tiled": ("codes lie in the order that FastDeploy's kernel takes", _tiled),
}


def split_reading(reading: str) -> tuple[str, ...]:
    """The deviations that a reading names, in the table's order: `documented`, or names of READINGS joined by +.

    Raises: ConvertError for an unknown name.
    """
    names = set(reading.split("+")) - {DOCUMENTED}
    for name in names - set(READINGS):
        raise ConvertError(f"reading {name!r}; expected {DOCUMENTED}, or, joined by +, {', '.join(READINGS)}")
    return tuple(name for name in READINGS if name in names)


def reading_name(deviations: Collection[str]) -> str:
    return "+".join(name for name in READINGS if name in deviations) or DOCUMENTED


def apply_reading(codes: Codes, projection: str, reading: str) -> Codes:
    for name in reversed(split_reading(reading)):
        codes = READINGS[name][1](codes, projection)
    return codes


@dataclass(frozen=True)
class TwoBitFolder:
    """A 2-bit release. `parts` are the tensors of every tensor-parallel slice, None without weight files."""

    folder: Path
    config: dict[str, Any]
    w4_end: int  # experts of layers up to this one are stored in 4 bits
    parts: tuple[dict[str, StoredTensor], ...] | None
    part_folders: tuple[Path, ...]


def find(folder: Path, *, need_weights: bool = True) -> TwoBitFolder | None:
    """The folder as a 2-bit release, None if its config.json does not say that it is one.

    Raises: ConvertError for another quantization of Baidu's; MissingFileError.
    """
    config = read_config(folder)
    said = config.get("quantization_config")
    if not isinstance(said, dict) or "quantization" not in said:
        return None
    where = folder / "config.json"
    if said["quantization"] != "wint2":
        raise ConvertError(
            f"{where}: quantization {shown(said['quantization'])}; of Baidu's quantized releases only 'wint2' can be "
            f"converted, use {original_name(folder)} instead"
        )
    blocks = section(said, "moe_quant_config", str(where))
    w4, w2 = (section(blocks, f"moe_w{n}_quant_config", str(where)) for n in (4, 2))
    for key, known in (("quant_type", "wint2"), ("quant_granularity", "pp_acc"), ("quant_group_size", 64)):
        if w2.get(key, known) != known:
            raise ConvertError(f"{where}: moe_w2_quant_config has {key} {shown(w2[key])}; only {known!r} is known")
    w4_end = whole(w4, "quant_end_layer", low=-1, high=N_LAYER_MAX, default=6, where=str(where))  # the loader's default
    w2_start = whole(w2, "quant_start_layer", low=0, high=N_LAYER_MAX + 1, default=w4_end + 1, where=str(where))
    if w2_start != w4_end + 1:
        raise ConvertError(
            f"{where}: 4 bits end with layer {w4_end} but 2 bits begin with layer {w2_start}; "
            "expected the layer after it"
        )
    ranks = sorted((p for p in folder.glob("rank*") if p.is_dir()), key=lambda p: (len(p.name), p.name))
    if len(ranks) == 1:  # the loader takes one alone for something else
        ranks = []
    if ranks and [p.name for p in ranks] != [f"rank{i}" for i in range(len(ranks))]:
        raise MissingFileError(f"{folder}: has {', '.join(p.name for p in ranks)}; expected rank0 and on, without gaps")
    folders = tuple(ranks) or (folder,)
    parts = [read_tensors(part, need_weights=need_weights)[0] for part in folders]
    complete = tuple(part for part in parts if part is not None)
    return TwoBitFolder(folder, config, w4_end, complete if len(complete) == len(parts) else None, folders)


def original_name(folder: Path) -> str:
    """What the release is called that a quantized one was made from."""
    stem = re.sub(r"-(2Bits|W4A8C8|FP8|WINT4|WINT8)?(-TP\d+)?-?Paddle$", "", folder.resolve().name)
    return f"{stem}-PT" if stem != folder.resolve().name else "the -PT release of the same model"


def check_same_model(two_bit: TwoBitFolder, original: Mapping[str, Any], folder: Path) -> None:
    """Raises ConvertError if both configurations say different things of the model."""
    if "quantization_config" in original:
        raise ConvertError(f"{folder}: is quantized too; the original is {original_name(two_bit.folder)}, in BF16")
    for key in _SAME:
        ours, theirs = two_bit.config.get(key), original.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise ConvertError(
                f"{folder}: {key} is {shown(theirs)}, in {two_bit.folder} it is {shown(ours)}; "
                f"the original of that is {original_name(two_bit.folder)}"
            )


@dataclass(frozen=True)
class _Stored:
    q: StoredTensor
    local: StoredTensor
    code_scale: StoredTensor
    code_zp: StoredTensor
    super_bf16: StoredTensor

    def codes(self) -> Codes:
        def array(tensor: StoredTensor, dtype: str) -> np.ndarray:
            return tensor.rows(0, tensor.n_rows).view(dtype)

        per_channel = [
            array(t, d)[0] for t, d in ((self.code_scale, "<f4"), (self.code_zp, "<f4"), (self.super_bf16, "<u2"))
        ]
        return Codes(self.q.name, array(self.q, "u1"), array(self.local, "u1"), *per_channel)


class Experts:
    """The routed experts that a 2-bit folder holds in 2 bits, found and of the right shape."""

    def __init__(self, two_bit: TwoBitFolder, c: TextConfig, bank: Bank, reading: str = DOCUMENTED) -> None:
        """Raises: TensorMappingError for a missing, odd or unknown tensor; ConvertError for sizes without a block."""
        self.two_bit, self.n_expert = two_bit, bank.n_expert
        self.reading = reading_name(split_reading(reading))
        self.layers = [il for il, sparse in enumerate(sparse_layers(c)) if sparse and il > two_bit.w4_end]
        if not self.layers:
            raise ConvertError(f"{two_bit.folder / 'config.json'}: no layer has experts in 2 bits")
        for key, n in (("hidden_size", c.n_embd), ("moe_intermediate_size", bank.n_ff)):
            if n % TYPE.block_size:
                raise ConvertError(
                    f"config.json: {key} {n} does not divide into blocks of {TYPE.name}, which take {TYPE.block_size}"
                )
        n_parts = len(two_bit.part_folders)
        if bank.n_ff % (128 * n_parts):
            raise ConvertError(f"config.json: moe_intermediate_size {bank.n_ff} does not divide into {n_parts} slices")
        self.sizes = {  # of a slice: input columns, output channels
            UP_GATE: (c.n_embd, 2 * bank.n_ff // n_parts),
            DOWN: (bank.n_ff // n_parts, c.n_embd),
        }
        self._stored: list[dict[tuple[int, int, str], _Stored]] = []
        for tensors, folder in zip(two_bit.parts or (), two_bit.part_folders, strict=bool(two_bit.parts)):
            try:
                self._stored.append(self._find(tensors))
            except TensorMappingError as error:
                raise TensorMappingError(f"{folder}: {error}") from None

    def _find(self, tensors: Mapping[str, StoredTensor]) -> dict[tuple[int, int, str], _Stored]:
        pool, layers = Pool(_named(tensors, set(self.layers))), self.layers
        check_experts(pool, self.n_expert, False)
        found = {}
        for il in layers:
            for e in range(self.n_expert):
                for p, (n_cols, n) in self.sizes.items():
                    stem = f"model.layers.{il}.mlp.experts.{e}.{p}"
                    spelling = next((s for s in _SUPER if f"{stem}.{s}" in pool), _SUPER[0])
                    five = [
                        pool.take(f"{stem}.quant_weight", (n_cols // 4, n), _BYTES),
                        pool.take(f"{stem}.weight_scale", (n_cols // 128, n), _BYTES),
                        pool.take(f"{stem}.code_scale", (n,), _FLOAT),
                        pool.take(f"{stem}.code_zp", (n,), _FLOAT),
                        pool.take(f"{stem}.{spelling}", (n,), _BITS16),
                    ]
                    stored = [tensors[rows.tensor.name] for rows in five if rows is not None]
                    if len(stored) == len(five):
                        found[il, e, p] = _Stored(*stored)
        pool.finish()
        return found

    def codes(self, il: int, expert: int, projection: str, reading: str | None = None) -> tuple[Codes, ...]:
        """An expert's projection in the wanted reading, as pieces along its columns, mapped where they can be.

        There is one piece, unless slices have parameters of their own.
        Raises: ConvertError if slices have them and a block would hold some of two slices.
        """
        reading = self.reading if reading is None else reading
        slices = [apply_reading(stored[il, expert, projection].codes(), projection, reading) for stored in self._stored]
        if len(slices) == 1:
            return tuple(slices)
        first = slices[0]
        if projection == UP_GATE:
            paired: dict[str, Any] = {n: _paired([getattr(s, n) for s in slices]) for n in _ALL}
            return (replace(first, **paired),)
        if all(
            np.array_equal(getattr(s, n).view("u1"), getattr(first, n).view("u1")) for s in slices for n in _PER_ROW
        ):
            joined: dict[str, Any] = {n: np.concatenate([getattr(s, n) for s in slices]) for n in ("q", "local")}
            return (replace(first, **joined),)
        if first.n_cols % TYPE.block_size:
            raise ConvertError(
                f"{first.name}: the {len(slices)} slices have parameters of their own for {first.n_cols} columns each, "
                f"but a block of {TYPE.name} has {TYPE.block_size}; convert the release that is not sliced"
            )
        return tuple(slices)

    def out_tensor(self, name: str, shape: tuple[int, ...]) -> OutTensor:
        """The stacked gate, up or down matrices of one layer as CCQ2_B; encoded and checked expert by expert."""
        found = _OUT.match(name)
        if found is None:
            raise ValueError(f"{name} holds no experts of a layer")
        il, which = int(found[1]), found[2]
        projection, n_rows = (DOWN if which == "down" else UP_GATE), shape[1]
        first = n_rows if which == "up" else 0

        def blocks() -> Iterator[np.ndarray]:
            for e in range(self.n_expert):
                yield encode(
                    [
                        piece.part(slice(first, first + n_rows), 0, piece.n_cols)
                        for piece in self.codes(il, e, projection)
                    ],
                    e,
                )

        return OutTensor(name, shape, TensorType(TYPE.ggml_id), blocks)


def _paired(slices: Sequence[np.ndarray]) -> np.ndarray:
    """Slices of [gate, up] along the last axis to [all gate, all up]."""
    half = slices[0].shape[-1] // 2
    return np.concatenate([s[..., :half] for s in slices] + [s[..., half:] for s in slices], axis=-1)


def _named(tensors: Mapping[str, StoredTensor], layers: set[int]) -> dict[str, StoredTensor]:
    """Under canonical names what belongs to experts in 2 bits, wherever it is."""
    out: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        key = canonical_name(name)
        expert = _EXPERT.match(key)
        if expert and (int(expert[1]) in layers or _ONLY_2BIT.search(key)):
            if key in out:
                raise TensorMappingError(f"{name} and {out[key].name} are two spellings of one tensor; keep one")
            out[key] = tensor
    return out


def encode(pieces: Sequence[Codes], seed: int = 0) -> np.ndarray:
    """Rows of CCQ2_B. Every 64th of them, beginning with one that `seed` picks, is decoded and compared bit for bit.

    Shapes: pieces (K/4, N) and so on -> (N, K / 512 * 142) uint8
    """
    rows = [encode_ccq2_b(p.q, p.local, p.code_scale, p.code_zp, p.super_bf16) for p in pieces]
    for piece, encoded in zip(pieces, rows, strict=True):
        picked = slice(7 * seed % min(_CHECKED_STEP, len(encoded)), None, _CHECKED_STEP)
        again = decode_ccq2_b(encoded[picked].reshape(-1, TYPE.block_bytes))
        meant = piece.part(picked, 0, piece.n_cols).weights()
        if not np.array_equal(again.view("<u4").reshape(meant.shape), np.ascontiguousarray(meant).view("<u4")):
            raise AssertionError(f"{piece.name}: blocks of {TYPE.name} do not decode to what the codes stand for")
    return rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1)


def with_experts(
    keys: Sequence[Key], tensors: Sequence[OutTensor], w4: Sequence[OutTensor], experts: Experts
) -> tuple[list[Key], list[OutTensor]]:
    """A model's keys and tensors with the experts that are stored in 2 bits; other experts are taken from `w4`."""
    small = {tensor.name: tensor for tensor in w4}
    out = []
    for tensor in tensors:
        found = _OUT.match(tensor.name)
        if not found:
            out.append(tensor)
        elif int(found[1]) in experts.layers:
            out.append(experts.out_tensor(tensor.name, tensor.shape))
        else:
            out.append(small[tensor.name])
    kind = Key("general.file_type", "u32", TYPE.ggml_id)
    return [kind if key.name == kind.name else key for key in keys], out
