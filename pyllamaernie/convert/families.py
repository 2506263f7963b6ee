"""What a checkpoint is: its family, the 16-bit type of its weights, its vocabulary.

A family is a module of this package, one per architecture. The table here is the only list of them.
"""

from __future__ import annotations

import logging
from types import ModuleType

from pyllamaernie.convert import ernie4_5, ernie4_5_moe, ernie4_5_vl_moe
from pyllamaernie.convert.checkpoint import Checkpoint
from pyllamaernie.convert.json_file import shown
from pyllamaernie.convert.tokenizer import VOCABULARY_FILES, Vocabulary, read_vocabulary
from pyllamaernie.errors import ConvertError

log = logging.getLogger("pyllamaernie.convert")

# config.json's model_type -> family. Baidu's own repositories of the VL model say ernie4_5_moe_vl.
FAMILIES: dict[str, ModuleType] = {
    "ernie4_5": ernie4_5,
    "ernie4_5_moe": ernie4_5_moe,
    "ernie4_5_vl_moe": ernie4_5_vl_moe,
    "ernie4_5_moe_vl": ernie4_5_vl_moe,
}
_STORED_TYPES = {"BF16": "bf16", "F16": "f16"}


def family_of(checkpoint: Checkpoint) -> ModuleType:
    """The family of config.json's model_type. Raises: ConvertError for one that is not known."""
    kind = checkpoint.config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConvertError(
            f"{checkpoint.folder / 'config.json'}: model_type {shown(kind)}; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def own_type(checkpoint: Checkpoint) -> str:
    """The 16-bit type of the first matrix that has one; f16 when all are float32 (as upstream's heuristics)."""
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) >= 2 and tensor.dtype in _STORED_TYPES:
            return _STORED_TYPES[tensor.dtype]
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return "bf16" if not checkpoint.has_weights and said == "bfloat16" else "f16"


def vocabulary_of(checkpoint: Checkpoint, *, dry_run: bool = False) -> tuple[Vocabulary, str | None]:
    """The vocabulary, and what is assumed for want of files; only a dry run does without any.

    Raises: TokenizerError; ConvertError for a config.json without vocab_size.
    """
    missing = []
    if not checkpoint.has_weights:
        missing.append(f"shapes from config.json, names from {'the index' if checkpoint.names else 'it too'}")
    if dry_run and not any((checkpoint.folder / name).is_file() for name in VOCABULARY_FILES):
        missing.append("no tokenizer to check")
        vocabulary = Vocabulary([], [], [], [])
    else:
        vocabulary = read_vocabulary(checkpoint, ernie4_5.vocabulary_size(checkpoint))
        if all(key.name != "tokenizer.chat_template" for key in vocabulary.keys):
            log.warning(
                "%s: no chat template in tokenizer_config.json, chat_template.jinja or chat_template.json, as in base "
                "models; the GGUF completes text, and a chat with it needs a template from elsewhere",
                checkpoint.folder,
            )
    return vocabulary, "; ".join(missing) or None
