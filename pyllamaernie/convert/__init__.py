"""A Hugging Face folder of an ERNIE 4.5 model to GGUF: the public names of the converter.

`convert` is in `conversion`; each architecture family has a module of its own, listed in `families`. A folder as what
a quantizer reads is in `source`, which needs the compiled module; everything named here does without it, since the
build converts a model before that module exists.
"""

from __future__ import annotations

from pyllamaernie.convert.conversion import ConvertResult, TensorRow, convert
from pyllamaernie.convert.outputs import TYPES, mmproj_path, mtp_path
from pyllamaernie.convert.progress import Progress
from pyllamaernie.convert.two_bit import check_two_bit
from pyllamaernie.convert.wint2_check import CheckReport

__all__ = [
    "TYPES",
    "CheckReport",
    "ConvertResult",
    "Progress",
    "TensorRow",
    "check_two_bit",
    "convert",
    "mmproj_path",
    "mtp_path",
]
