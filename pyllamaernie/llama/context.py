"""What a context is made with, and how long a context fits into this machine's memory."""

from __future__ import annotations

import logging
from typing import TypedDict

from pyllamaernie.gguf.header import Header
from pyllamaernie.machine import free_memory_bytes

logger = logging.getLogger("pyllamaernie")

KV_MEMORY_SHARE = 8  # by default the KV cache takes at most this fraction (1/8) of the free memory
N_CTX_MIN = 512


class ContextOptions(TypedDict):
    """Options of `_core.Session`; types are ggml's numbers, `flash_attn` is llama.h's."""

    n_batch: int
    n_ubatch: int
    n_threads: int
    type_k: int
    type_v: int
    flash_attn: int


def default_n_ctx(model: Header, bytes_per_value: float) -> int:
    """The model's own context, capped so that its KV cache takes at most an eighth of the free memory."""
    n_train = int(model.get("context_length") or 4096)
    n_layer = int(model.get("block_count") or 1)
    n_head = int(model.get("attention.head_count") or 1)
    n_head_kv = int(model.get("attention.head_count_kv") or n_head)
    head_dim = int(model.get("embedding_length") or 1) // max(n_head, 1)
    width = int(model.get("attention.key_length") or head_dim) + int(model.get("attention.value_length") or head_dim)
    per_token = max(1.0, n_layer * n_head_kv * width * bytes_per_value)
    n_fit = int(free_memory_bytes() / KV_MEMORY_SHARE / per_token) // 256 * 256
    if n_fit < n_train:
        logger.info(
            "n_ctx: %d instead of the model's %d, to keep the KV cache within memory", max(n_fit, N_CTX_MIN), n_train
        )
    return min(n_train, max(n_fit, N_CTX_MIN))
