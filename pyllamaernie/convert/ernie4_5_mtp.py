"""The multi-token-prediction layers of a text checkpoint, as a draft model of their own (arch `ernie4_5-mtp`).

They go into a GGUF beside the text model, `mtp-NAME.gguf`, because llama.cpp refuses a file with tensors that its
architecture does not know: so the text model stays loadable anywhere, and whoever wants drafts adds
`-md mtp-NAME.gguf --spec-type draft-mtp`. The embedding, the output norm and an untied output matrix are repeated.

Layout: `model.mtp_{emb_norm,hidden_norm,linear_proj,block}.N` in Baidu's `-PT` files. A layer reads the next token's
embedding and the text model's normalised last hidden state, in this order, and is a dense decoder layer.
Source: vLLM `ernie_mtp.py`, SGLang `ernie4_eagle.py`, and FastDeploy's order of norms as third parties measured it
best (hidden state after the output norm, the output norm again before the output matrix). No released weights were at
hand here.
"""

from __future__ import annotations

import re

from pyllamaernie.convert import ernie4_5
from pyllamaernie.convert.ernie4_5 import TextConfig
from pyllamaernie.convert.plan import Pool, out_tensor
from pyllamaernie.errors import ConvertError
from pyllamaernie.gguf.file import Key, OutTensor, TensorType

ARCH = "ernie4_5-mtp"
NAMES = re.compile(r"^model\.mtp_")


def n_layers(pool: Pool) -> int:
    """How many there are, counted from 0 without a gap."""
    n = 0
    while n < ernie4_5.N_MTP_MAX and f"model.mtp_linear_proj.{n}.weight" in pool:
        n += 1
    return n


def draft_model(pool: Pool, c: TextConfig, wanted: TensorType) -> tuple[list[Key], list[OutTensor]]:
    """Keys and tensors of the draft GGUF. To be asked for after the text model, whose tensors it shares.

    Raises: ConvertError when a layer is not a dense one.
    """
    n = n_layers(pool)
    out = ernie4_5.stem_tensors(pool, c, wanted)
    for i in range(n):
        mlp, blk = f"model.mtp_block.{i}.mlp", f"blk.{i}"
        if f"{mlp}.experts.0.down_proj.weight" in pool:
            raise ConvertError(
                f"{mlp} has experts; only dense multi-token-prediction layers are known (--no-mtp leaves them out)"
            )
        out += ernie4_5.attention_tensors(pool, c, i, wanted, stack="model.mtp_block")
        out += ernie4_5.mlp_tensors(pool, c, mlp, blk, c.n_ff, wanted)
        for theirs, ours, shape in (
            ("linear_proj", "eh_proj", (c.n_embd, 2 * c.n_embd)),
            ("emb_norm", "enorm", (c.n_embd,)),
            ("hidden_norm", "hnorm", (c.n_embd,)),
        ):
            rows = pool.take(f"model.mtp_{theirs}.{i}.weight", shape)
            out.append(out_tensor(f"{blk}.nextn.{ours}.weight", [rows], shape, wanted))
    keys = ernie4_5.text_keys(ARCH, c, wanted, n_layer=n) + ernie4_5.head_size_keys(ARCH, c)
    return [*keys, Key(f"{ARCH}.nextn_predict_layers", "u32", n)], out
