"""A GGUF that says what a test wants: after a given last token of the prompt it writes a given text, byte by byte.

A one-layer ERNIE 4.5 whose attention and feed-forward add nothing, so the hidden state is the last token's embedding
and the output matrix is a table "after this token comes that one". Every byte of a script has a token of its own, hence
a character of three bytes takes three tokens; <think> and </think> stay single tokens, as in the real vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tiny_vocabulary import BYTE, UNUSED, pieces, token_id

N_EMBD, N_HEAD, HEAD_DIM, N_FF = 256, 2, 64, 32
EOS = token_id("</s>")


Vocabulary = list[tuple[str, float, int]]  # piece, score, type


def write(path: Path, scripts: Mapping[str, str], template: str | None, n_ctx: int = 4096) -> Path:
    """Write the model. `scripts` maps a piece of the vocabulary, the prompt's last token, to the text that follows.

    </think> can be followed by one text only: the first script that holds it has the real token, others spell it out.
    """
    vocabulary, follows = _spell_out(scripts)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "ernie4_5")
    _add_sizes(writer, n_ctx)
    _add_tokenizer(writer, vocabulary)
    if template is not None:
        writer.add_chat_template(template)
    for name, tensor in _tensors(len(vocabulary), follows).items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _spell_out(scripts: Mapping[str, str]) -> tuple[Vocabulary, dict[int, int]]:
    """The vocabulary with a token for every byte of the scripts, and which token follows which."""
    vocabulary = [(text, score, kind) for text, score, kind in pieces()]
    follows: dict[int, int] = {}
    has_end = False
    for trigger, text in scripts.items():
        last = token_id(trigger)
        for part in re.split("(</think>)", text):
            if part == "</think>" and not has_end:
                has_end = True
                last = follows.setdefault(last, token_id(part))
                continue
            for byte in part.encode():
                vocabulary.append((f"<0x{byte:02X}>{len(vocabulary)}", 0.0, BYTE))
                last = follows.setdefault(last, len(vocabulary) - 1)
        follows[last] = EOS
    while len(vocabulary) % 32:
        vocabulary.append((f"<unused{len(vocabulary)}>", 0.0, UNUSED))
    return vocabulary, follows


def _tensors(n_vocab: int, follows: Mapping[int, int]) -> dict[str, np.ndarray]:
    """Embeddings of length 1, an output matrix that gives the follower the highest logit, and a layer that is zero."""
    rng = np.random.default_rng(0)
    embedding = rng.standard_normal((n_vocab, N_EMBD)).astype(np.float32)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    output = np.zeros_like(embedding)
    for token, successor in follows.items():
        output[successor] += 4 * embedding[token]
    tensors = {"token_embd": embedding, "output": output, "output_norm": np.ones(N_EMBD, np.float32)}
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{name}"] = np.ones(N_EMBD, np.float32)
    width = N_HEAD * HEAD_DIM
    for name, shape in {
        "attn_q": (width, N_EMBD),
        "attn_k": (width, N_EMBD),
        "attn_v": (width, N_EMBD),
        "attn_output": (N_EMBD, width),
        "ffn_gate": (N_FF, N_EMBD),
        "ffn_up": (N_FF, N_EMBD),
        "ffn_down": (N_EMBD, N_FF),
    }.items():
        tensors[f"blk.0.{name}"] = np.zeros(shape, np.float32)
    return tensors


def _add_sizes(writer: gguf.GGUFWriter, n_ctx: int) -> None:
    writer.add_block_count(1)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in vocabulary])
    writer.add_token_scores([score for _, score, _ in vocabulary])
    writer.add_token_types([kind for _, _, kind in vocabulary])
    writer.add_bos_token_id(token_id("<s>"))
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(token_id("<|end_of_sentence|>"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
