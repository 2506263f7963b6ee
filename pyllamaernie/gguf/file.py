"""GGUF files, read and written in a stream, by the `gguf` package; no other module imports it.

Not a model of GGUF: whatever a converter wants to say is passed through as (key, value, kind) and (name, shape, type).
"""

from __future__ import annotations

import datetime
import enum
import io
import logging
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np

from pyllamaernie.gguf.types import QUANT_TYPES, QuantType

log = logging.getLogger("pyllamaernie.gguf")
logging.getLogger("gguf").setLevel(logging.ERROR)

TokenType = gguf.TokenType
TensorType = gguf.GGMLQuantizationType
Number = TypeVar("Number", bound=enum.IntEnum)


def _add_member(numbers: type[Number], name: str, value: int) -> Number:
    """A new member of an enumeration of the gguf package, which has no way to add one."""
    if value in numbers._value2member_map_:
        raise RuntimeError(f"gguf's {numbers.__name__} has {numbers(value).name} for {value} already; {name} needs it")
    member = int.__new__(numbers, value)
    member._name_, member._value_ = name, value
    type.__setattr__(numbers, name, member)
    numbers._member_map_[name] = numbers._value2member_map_[value] = member
    numbers._member_names_.append(name)
    return member


def _register(row: QuantType) -> None:
    """Lets the gguf package read and write one of our types."""
    member = _add_member(TensorType, row.name, row.ggml_id)
    _add_member(gguf.LlamaFileType, f"MOSTLY_{row.name}", row.ggml_id)
    gguf.GGML_QUANT_SIZES[member] = (row.block_size, row.block_bytes)


def add_decoder(name: str, decode: Callable[[np.ndarray], np.ndarray]) -> None:
    """Lets the gguf package decode one of our types: by a function of its blocks.

    Shapes: (n_blocks, block_bytes) uint8 -> (n_blocks, block_size) float32.
    """
    member = TensorType.__members__[name]

    def dequantize_blocks(cls: type, blocks: np.ndarray) -> np.ndarray:
        return decode(blocks)

    base = vars(gguf.quants)["__Quant"]  # its subclasses enter themselves in gguf's table
    types.new_class(
        name,
        (base,),
        {"qtype": member},
        lambda names: names.update(dequantize_blocks=classmethod(dequantize_blocks)),
    )


for _row in QUANT_TYPES.values():
    _register(_row)
FILE_TYPES = {
    TensorType.F32: int(gguf.LlamaFileType.ALL_F32),
    TensorType.F16: int(gguf.LlamaFileType.MOSTLY_F16),
    TensorType.BF16: int(gguf.LlamaFileType.MOSTLY_BF16),
    TensorType.Q8_0: int(gguf.LlamaFileType.MOSTLY_Q8_0),
    TensorType.Q4_0: int(gguf.LlamaFileType.MOSTLY_Q4_0),
}
QUANTIZATION_VERSION = gguf.GGML_QUANT_VERSION

# key of generation_config.json -> the package's name for it, and the type it is written in
SAMPLING = {
    "sequence": ("sampling_sequence", "str"),
    "top_k": ("sampling_top_k", "i32"),
    "top_p": ("sampling_top_p", "f32"),
    "min_p": ("sampling_min_p", "f32"),
    "xtc_probability": ("sampling_xtc_probability", "f32"),
    "xtc_threshold": ("sampling_xtc_threshold", "f32"),
    "temperature": ("sampling_temp", "f32"),
    "penalty_last_n": ("sampling_penalty_last_n", "i32"),
    "penalty_repeat": ("sampling_penalty_repeat", "f32"),
    "mirostat": ("sampling_mirostat", "i32"),
    "mirostat_tau": ("sampling_mirostat_tau", "f32"),
    "mirostat_eta": ("sampling_mirostat_eta", "f32"),
}

_CARD_BYTES, _README_BYTES, _CARD_ITEMS = 64 * 2**10, 16 * 2**20, 1000
_CARD_LISTS = ("license", "tags", "pipeline_tag", "language", "languages")
_CARD_OBJECTS = ("base_model", "base_models", "base_model_sources", "dataset", "datasets", "dataset_sources")
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_KINDS: dict[str, Callable[..., None]] = {
    "str": gguf.GGUFWriter.add_string,
    "bool": gguf.GGUFWriter.add_bool,
    "u32": gguf.GGUFWriter.add_uint32,
    "u64": gguf.GGUFWriter.add_uint64,
    "f32": gguf.GGUFWriter.add_float32,
    "list": gguf.GGUFWriter.add_array,
}


@dataclass(frozen=True)
class Key:
    """One metadata entry; `kind` is str, bool, u32, u64, f32 or list."""

    name: str
    kind: str
    value: Any


@dataclass(frozen=True)
class OutTensor:
    """One tensor to be written: `shape` in numpy order, `blocks()` yields its bytes in order, piece by piece."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def n_bytes(self) -> int:
        return type_bytes(self.shape, self.type)


def type_bytes(shape: Sequence[int], tensor_type: TensorType) -> int:
    """Size of a tensor in the file, without padding."""
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    return math.prod(shape) // block * size


def block_size(tensor_type: TensorType) -> int:
    """How many values of a row one block of the type holds."""
    return gguf.GGML_QUANT_SIZES[tensor_type][0]


def encode_rows(rows: np.ndarray, tensor_type: TensorType) -> np.ndarray:
    """Rows of float32 in the bytes of a type.

    Shapes: (n_rows, n_cols) float32 -> any dtype, n_rows * row bytes.
    Source: gguf-py `quants.quantize`, which matches ggml's reference quantizers bit for bit.
    """
    return gguf.quants.quantize(rows, tensor_type)


def dequantize(data: np.ndarray, tensor_type: TensorType) -> np.ndarray:
    """Rows of any type as float32. Raises NotImplementedError for a type that the gguf package cannot decode.

    Shapes: (..., n_cols or row bytes) -> (..., n_cols) float32.
    """
    return gguf.quants.dequantize(np.ascontiguousarray(data), tensor_type).astype(np.float32, copy=False)


def file_bytes(tensors: Iterable[OutTensor]) -> int:
    """Bytes of all tensors with their padding; the header comes on top."""
    return sum(-(-t.n_bytes // _ALIGNMENT) * _ALIGNMENT for t in tensors)


def write_gguf(
    path: Path,
    arch: str,
    keys: Sequence[Key],
    tensors: Sequence[OutTensor],
    on_bytes: Callable[[int], None] = lambda n: None,
) -> None:
    """Writes one GGUF file with one block of one tensor in memory at a time; `on_bytes` hears of each written block."""
    writer = gguf.GGUFWriter(path=None, arch=arch)  # writes general.architecture itself
    for key in keys:
        _KINDS[key.kind](writer, key.name, key.value)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=tensor.type)
    writer.write_header_to_file(path=path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        out.write(bytes(-out.tell() % _ALIGNMENT))
        for tensor in tensors:
            n_written = 0
            for block in tensor.blocks():
                data = np.ascontiguousarray(block)
                out.write(data.data)
                n_written += data.nbytes
                on_bytes(data.nbytes)
            if n_written != tensor.n_bytes:
                raise AssertionError(f"{tensor.name}: wrote {n_written} bytes, header says {tensor.n_bytes}")
            out.write(bytes(-n_written % _ALIGNMENT))
    finally:
        writer.close()


def general_keys(
    folder: Path,
    counts: tuple[int, int, int, int],
    *,
    file_kind: str,
    model_id: str | None = None,
    sampling: Mapping[str, int | float | str] | None = None,
) -> list[Key]:
    """The `general.*` keys that upstream's converter derives from the folder's name, its config and its model card.

    `counts`: parameters in all, shared, in one expert, and the number of experts. `file_kind`: model or mmproj.
    `model_id`: `_name_or_path` of config.json. `sampling`: the values of generation_config.json that are of SAMPLING,
    checked. A model card that cannot be used is left out with a warning, since no model depends on it.
    """
    named = Path(os.fsencode(folder.name).decode("utf-8", "replace"))
    params = {} if model_id is None else {"_name_or_path": model_id}
    try:
        metadata = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), _card(folder), params, named, counts[0])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        log.warning("%s: no name can be made of README.md, config.json and the folder's own (%s)", folder, error)
        metadata = gguf.Metadata()
    for key, value in (sampling or {}).items():
        setattr(metadata, SAMPLING[key][0], value)
    if metadata.name is None:
        metadata.name = named.name
    if metadata.size_label is None and counts[0] > 0:
        metadata.size_label = gguf.size_label(*counts)
    writer = gguf.GGUFWriter(path=None, arch="none")
    writer.add_type(file_kind)
    metadata.set_gguf_meta_model(writer)
    return _collected(writer)


def _card(folder: Path) -> dict[str, Any]:
    """What the head of README.md says, as far as it is text: upstream's writer takes nothing else."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        head = file.read(_CARD_BYTES)
    lines = [line.rstrip(b"\r") for line in head.split(b"\n")]
    if lines[0] != b"---":
        return {}
    if path.stat().st_size > _README_BYTES or b"---" not in lines[1:]:
        log.warning("%s: left out, its head is not closed within %d bytes or the file is too large", path, _CARD_BYTES)
        return {}
    try:
        card = gguf.Metadata.load_model_card(folder)
    except Exception as error:  # YAML of any kind, and a reader that promises no exception in particular
        log.warning("%s: left out, its head cannot be read (%s)", path, type(error).__name__)
        return {}
    out = {}
    for key, value in card.items():
        kept = _card_value(value, str(key))
        if kept is not None:
            out[key] = kept
        elif value is not None and value != []:
            log.warning("%s: %s is left out, expected text", path, ascii(key)[:80])
    return out


def _card_value(value: Any, key: str) -> Any:
    """What upstream's writer can take: text, and for some keys a list of texts or of objects of them; else None."""
    if isinstance(value, list) and key in (*_CARD_LISTS, *_CARD_OBJECTS) and 0 < len(value) <= _CARD_ITEMS:
        items = [_card_item(item) if key in _CARD_OBJECTS else _card_text(item) for item in value]
        return None if None in items else items
    return _card_text(value)


def _card_item(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > _CARD_ITEMS:
        return _card_text(value)
    items = {key: _card_text(item) for key, item in value.items() if isinstance(key, str)}
    return None if None in items.values() else items


def _card_text(value: Any) -> str | None:
    """Texts; numbers and dates, which YAML makes of texts that look like them, as text again."""
    if isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
        value = str(value)
    return value if isinstance(value, str) and _is_utf8(value) else None


def _is_utf8(text: str) -> bool:
    try:
        return len(text.encode("utf-8")) <= _CARD_BYTES
    except UnicodeEncodeError:
        return False


def _collected(writer: gguf.GGUFWriter) -> list[Key]:
    names = {
        gguf.GGUFValueType.INT32: "i32",
        gguf.GGUFValueType.STRING: "str",
        gguf.GGUFValueType.BOOL: "bool",
        gguf.GGUFValueType.UINT32: "u32",
        gguf.GGUFValueType.UINT64: "u64",
        gguf.GGUFValueType.FLOAT32: "f32",
        gguf.GGUFValueType.ARRAY: "list",
    }
    return [
        Key(name, names[value.type], value.value)
        for kv in writer.kv_data
        for name, value in kv.items()
        if name != "general.architecture"
    ]


# ---- reading a file back, to write it again


@dataclass(frozen=True)
class InTensor:
    """One tensor of a file. `data` is a view into the mapped file: numbers, or the bytes of a quantized type.

    Shapes: `shape` in numpy order; data the same, with bytes instead of values in the last dimension if quantized.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    data: np.ndarray


_VALUE_KINDS = {
    gguf.GGUFValueType.UINT8: "u8",
    gguf.GGUFValueType.INT8: "i8",
    gguf.GGUFValueType.UINT16: "u16",
    gguf.GGUFValueType.INT16: "i16",
    gguf.GGUFValueType.UINT32: "u32",
    gguf.GGUFValueType.INT32: "i32",
    gguf.GGUFValueType.UINT64: "u64",
    gguf.GGUFValueType.INT64: "i64",
    gguf.GGUFValueType.FLOAT32: "f32",
    gguf.GGUFValueType.FLOAT64: "f64",
    gguf.GGUFValueType.BOOL: "bool",
    gguf.GGUFValueType.STRING: "str",
}


def _adder(value_type: gguf.GGUFValueType, item_type: gguf.GGUFValueType | None = None) -> Callable[..., None]:
    return lambda writer, name, value: writer.add_key_value(name, value, value_type, item_type)


for _type, _kind in _VALUE_KINDS.items():  # a copied key keeps its exact type: `i32`, `list:u32`, ...
    _KINDS.setdefault(_kind, _adder(_type))
    _KINDS[f"list:{_kind}"] = _adder(gguf.GGUFValueType.ARRAY, _type)


def read_gguf(path: Path) -> tuple[dict[str, Key], list[InTensor]]:
    """Metadata and tensors of a GGUF file; nothing but the metadata is read until a tensor's data is touched.

    Left out: empty arrays, which the writer cannot write, and `general.alignment`, which is the writer's own.
    Raises: ValueError, KeyError or IndexError for a file that is not sound.
    """
    reader = gguf.GGUFReader(path)
    if reader.byte_order == "S":
        raise ValueError("its bytes are in the order of another kind of machine")
    keys = {}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.alignment":
            continue
        if field.types[0] != gguf.GGUFValueType.ARRAY:
            keys[name] = Key(name, _VALUE_KINDS[field.types[0]], field.contents())
        elif len(field.data) and field.types[-1] == gguf.GGUFValueType.STRING:
            keys[name] = Key(name, "list:str", [bytes(field.parts[i]) for i in field.data])  # need not be UTF-8
        elif len(field.data):
            keys[name] = Key(name, f"list:{_VALUE_KINDS[field.types[-1]]}", field.contents())
    tensors = [
        InTensor(t.name, tuple(int(n) for n in reversed(t.shape.tolist())), t.tensor_type, t.data)
        for t in reader.tensors
    ]
    return keys, tensors


def size_label(n_total: int, n_shared: int, n_per_expert: int, n_expert: int) -> str:
    """What `general.size_label` says about parameters: in all, outside of the experts, in one expert of all layers."""
    return gguf.size_label(n_total, n_shared, n_per_expert, n_expert)


def gguf_header(
    arch: str, keys: Sequence[Key], tensors: Sequence[tuple[str, tuple[int, ...], TensorType, int]]
) -> tuple[bytes, list[int]]:
    """The head of a GGUF file, and where in the file each tensor's bytes go; tensors are (name, shape, type, bytes).

    The head ends where the first tensor begins. Shapes are in numpy order.
    """
    writer = gguf.GGUFWriter(path=None, arch=arch)
    for key in keys:
        _KINDS[key.kind](writer, key.name, key.value)
    for name, shape, tensor_type, n_bytes in tensors:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=tensor_type)
    out = io.BytesIO()
    files: list[Any] = [out]
    writer.fout, writer.state = files, gguf.gguf_writer.WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    out.write(bytes(-out.tell() % _ALIGNMENT))
    offsets, at = [], out.tell()
    for _, _, _, n_bytes in tensors:
        offsets.append(at)
        at += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
    return out.getvalue(), offsets


def file_type(name: str) -> int | None:
    """The number in `general.file_type` of a preset (Q4_K_M) or of a file mostly in one type (Q4_K); None: no such.

    Source: for types, the guess in llama.cpp src/llama-model-loader.cpp at the pin.
    """
    odd = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    by_type = {f"Q{n}_K": f"MOSTLY_Q{n}_K_M" for n in (3, 4, 5)}
    found = gguf.LlamaFileType.__members__.get({**odd, **by_type}.get(name, f"MOSTLY_{name}"))
    return None if found is None else int(found)
