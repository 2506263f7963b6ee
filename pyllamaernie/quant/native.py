"""ggml's own quantizers on rows of weights: the table of its types, and rows to and from their bytes.

Every function gives Python's lock away while it works, so threads scale. Rows are independent of each other: any cut of
a tensor gives the bytes that llama-quantize writes. Type names are ggml's in capital letters, as the gguf package has
them: Q4_K, IQ2_XXS, CCQ2_5, BF16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyllamaernie import _core
from pyllamaernie.errors import InputError, QuantizeError


@dataclass(frozen=True)
class GgmlType:
    """A type that weights are stored in. `needs_importance`: its encoder does not work without importance data."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int
    is_quantized: bool
    needs_importance: bool

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_size

    def fits(self, n_cols: int) -> bool:
        """Whether rows of this length are whole blocks."""
        return n_cols > 0 and n_cols % self.block_size == 0

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of `n_cols` values."""
        return n_cols // self.block_size * self.block_bytes


TYPES: dict[str, GgmlType] = {row[0].upper(): GgmlType(row[0].upper(), *row[1:]) for row in _core.quant_types()}

# Without importance data these give a model that does not work, so llama-quantize refuses them, save for the embedding
# and the output matrix. Source: `tensor_requires_imatrix` in llama.cpp src/llama-quant.cpp at the pin.
WANT_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


def ggml_type(name: str) -> GgmlType:
    """The row of a type; case does not matter. Raises: InputError naming the types there are."""
    found = TYPES.get(name.upper())
    if found is None:
        raise InputError(f"type {name!r} is not known; types are {', '.join(TYPES)}")
    return found


def quantize(type_name: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The rows in the bytes of a type.

    Shapes: (n_rows, n_cols) float32, (n_cols,) float32 -> (n_rows, row bytes) uint8
    Raises: QuantizeError naming the type and the value that it cannot hold, with its row and column; or what is wrong
    with the importance of a column; or rows that are not whole blocks.
    """
    rows = np.ascontiguousarray(rows, np.float32)
    if rows.ndim != 2:
        raise QuantizeError(f"{type_name}: rows have shape {rows.shape}, expected (n_rows, n_cols)")
    return requantize(type_name, "F32", rows.view(np.uint8), rows.shape[1], importance)


def requantize(
    type_name: str,
    source_type: str,
    data: np.ndarray,
    n_cols: int,
    importance: np.ndarray | None = None,
    first_row: int = 0,
) -> np.ndarray:
    """Rows in the bytes of one type as bytes of another; float32 values exist for a few rows at a time only.

    `first_row` is added to the row that an error names.
    Shapes: (n_rows, row bytes of source_type) uint8, (n_cols,) float32 -> (n_rows, row bytes) uint8
    Raises: QuantizeError as `quantize`.
    """
    ids = ggml_type(type_name).ggml_id, ggml_type(source_type).ggml_id
    try:
        return _core.quantize(*ids, data, n_cols, importance, first_row)
    except ValueError as error:
        raise QuantizeError(str(error)) from None


def dequantize(type_name: str, data: np.ndarray, n_cols: int) -> np.ndarray:
    """Rows of any type as numbers.

    Shapes: (n_rows, row bytes) uint8 -> (n_rows, n_cols) float32
    Raises: QuantizeError for bytes that are not whole rows.
    """
    try:
        return _core.dequantize(ggml_type(type_name).ggml_id, data, n_cols)
    except ValueError as error:
        raise QuantizeError(str(error)) from None


def validate(type_name: str, data: np.ndarray) -> bool:
    """Whether all scales, or all values of a float type, are finite numbers, as a loader checks them."""
    return _core.validate(ggml_type(type_name).ggml_id, data)
