"""Rows of weights into the bytes of a type and back: ggml's types by the gguf package, ours by their definition.

Whoever decodes takes `dequantize` from here: this module lets the gguf package decode our types. Encoding into them is
C's work (`native`), numpy is too slow for it.
"""

from __future__ import annotations

from functools import partial

from pyllamaernie.gguf.file import add_decoder
from pyllamaernie.gguf.file import dequantize as dequantize
from pyllamaernie.gguf.file import encode_rows as encode_rows
from pyllamaernie.gguf.types import QUANT_TYPES
from pyllamaernie.quant import ccq

for _name in QUANT_TYPES:
    add_decoder(_name, partial(ccq.decode, _name) if _name in ccq.CODES else ccq.decode_ccq2_b)
