"""The table of our quantization types: what a GGUF reader or a size estimate must know of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantType:
    """One type; `ggml_id` is its number in GGUF files and, for a file all of it, the file type's as well."""

    name: str
    ggml_id: int
    block_size: int  # weights
    block_bytes: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_size


QUANT_TYPES = {
    row.name: row
    for row in (
        QuantType("CCQ2", 112, 256, 66),
        QuantType("CCQ2_25", 113, 256, 74),
        QuantType("CCQ2_5", 114, 256, 82),
        QuantType("CCQ2_75", 115, 256, 90),
        QuantType("CCQ2_B", 116, 512, 142),
    )
}
