"""The graph of `ernie4_5-vl-moe`: static, with one expert bank computed per ubatch, at no lasting cost in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import gguf_models
import numpy as np
import pytest

from pyllamaernie import Llama
from pyllamaernie.llama.scorer import Scorer
from pyllamaernie.media.image import Image

N_SPARSE_LAYERS = 3  # of 4; the first is dense
PER_LAYER = 3  # gate, up, down


def expert_products(scorer: Scorer) -> Counter[str]:
    """How many expert matrix products ran in the last decode, by bank."""
    weights = [weight for op, _, weight in scorer.session.last_nodes if op == "MUL_MAT_ID"]
    return Counter("vision" if "_exps_vl." in weight else "text" for weight in weights)


@pytest.fixture(scope="module")
def traced() -> Iterator[Scorer]:
    with Llama(gguf_models.gguf("vl"), type_k="f32", type_v="f32", n_ctx=512) as llm:
        yield llm.scorer(trace=True)


def test_text_computes_the_text_experts_only(traced: Scorer) -> None:
    traced.logits([5, 6, 7, 8])
    assert expert_products(traced) == {"text": N_SPARSE_LAYERS * PER_LAYER}


def test_picture_computes_the_vision_experts_only(traced: Scorer) -> None:
    picture = Image(gguf_models.picture(84, 140))
    traced.logits(gguf_models.image_ids(3, 5), [picture])
    assert expert_products(traced) == {"vision": N_SPARSE_LAYERS * PER_LAYER}


def test_graph_has_one_shape_for_text_and_pictures(traced: Scorer) -> None:
    """Both compute as many nodes of each kind; only text looks its embeddings up."""
    traced.logits(gguf_models.image_ids(3, 5), [Image(gguf_models.picture(84, 140))])
    picture = Counter(op for op, _, _ in traced.session.last_nodes)
    traced.logits([5] * 17)
    text = Counter(op for op, _, _ in traced.session.last_nodes)
    assert text - picture == {"GET_ROWS": 1}
    assert not picture - text


def test_plan_made_for_text_serves_pictures() -> None:
    """A context that has seen text first must give a picture the logits of a fresh context."""
    picture = Image(gguf_models.picture(84, 140))
    ids = [*gguf_models.image_ids(3, 5), 5, 6, 7]
    with Llama(gguf_models.gguf("vl"), type_k="f32", type_v="f32", n_ctx=512) as llm:
        fresh = llm.logits(ids, images=[picture])
    with Llama(gguf_models.gguf("vl"), type_k="f32", type_v="f32", n_ctx=512) as llm:
        llm.logits([9] * 40)
        after_text = llm.logits(ids, images=[picture])
        llm.logits([9] * 3)
        again = llm.logits(ids, images=[picture])
    np.testing.assert_array_equal(after_text, fresh)
    np.testing.assert_array_equal(again, fresh)


def test_graph_is_reused_across_decode_steps_after_a_picture() -> None:
    """A scorer without a trace, since callbacks change nothing here but are not what users run."""
    with Llama(gguf_models.gguf("vl"), type_k="f32", type_v="f32", n_ctx=512) as llm:
        scorer = llm.scorer()
        ids = gguf_models.image_ids(3, 5)
        scorer.logits(ids, [Image(gguf_models.picture(84, 140))])
        session = scorer.session
        before, n_past, n_steps = session.n_graph_reuse, len(ids), 12
        for step in range(n_steps):
            session.decode_tokens(np.array([5 + step], np.int32), n_past + step)
        # the first step builds the graph of one token, the others reuse it
        assert session.n_graph_reuse - before == n_steps - 1


def test_vision_experts_add_at_most_one_percent_of_compute_buffer() -> None:
    """The text MoE of the same sizes is the model without them."""
    sizes = {}
    for kind in ("moe", "vl"):
        with Llama(gguf_models.gguf(kind), n_ctx=2048, n_batch=512, n_ubatch=512) as llm:
            sizes[kind] = llm.scorer().session.compute_buffer_bytes
    assert sizes["vl"] <= 1.01 * sizes["moe"], sizes
