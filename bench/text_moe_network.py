"""The network of the text MoE in torch, and its weights under Baidu's names. Not its training: that is `text_moe.py`.

ERNIE 4.5's text MoE: softmax router with a correction bias, shared expert, rotation of neighbouring pairs, no biases.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from checkpoint_shapes import Shape
from torch import nn
from torch.nn import functional as F

BIAS_RATE = 1e-3  # mild, so that the experts' shares stay uneven


class Draw:
    """Random matrices, one after the other from one seed."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.out_gain = 1 / math.sqrt(2 * shape.n_layer)

    def matrix(self, *dims: int, gain: float = 1.0) -> nn.Parameter:
        return nn.Parameter(torch.randn(dims, generator=self.generator) * gain / math.sqrt(dims[-1]))

    def out_matrix(self, *dims: int) -> nn.Parameter:
        """One that adds to the residual stream."""
        return self.matrix(*dims, gain=self.out_gain)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours, as ERNIE's."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


class Norm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, 1e-5)


class Mlp(nn.Module):
    def __init__(self, shape: Shape, draw: Draw, n_ff: int) -> None:
        super().__init__()
        self.gate, self.up = draw.matrix(n_ff, shape.n_embd), draw.matrix(n_ff, shape.n_embd)
        self.down = draw.out_matrix(shape.n_embd, n_ff)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Experts(nn.Module):
    """Routed experts, of which a projection is one parameter, beside the shared one."""

    def __init__(self, shape: Shape, draw: Draw) -> None:
        super().__init__()
        n, width = shape.n_expert, shape.n_ff_exp
        self.n_expert, self.n_used = n, shape.n_expert_used
        self.router = draw.matrix(n, shape.n_embd)
        self.gate, self.up = draw.matrix(n, width, shape.n_embd), draw.matrix(n, width, shape.n_embd)
        self.down = draw.out_matrix(n, shape.n_embd, width)
        self.shared = Mlp(shape, draw, shape.n_shared * width)
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("load", torch.zeros(n))
        self.balance: torch.Tensor | float = 0.0

    def choose(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each token's experts and their weights, and how many tokens each expert got; keeps count of the shares.

        Shapes: (n, n_embd) -> (n, n_used), (n, n_used), (n_expert,)
        """
        with torch.autocast("cpu", enabled=False):
            p = F.linear(flat.float(), self.router).softmax(-1)
        chosen = (p.detach() + self.bias).topk(self.n_used, -1).indices
        g = p.gather(1, chosen)
        g = g / g.sum(-1, keepdim=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.n_expert)
        if self.training:
            share = counts / counts.sum()
            self.balance = self.n_expert * (share * p.mean(0)).sum()
            self.bias += BIAS_RATE * (1 / self.n_expert - share).sign()
        self.load.lerp_(counts / counts.sum(), 0.05)
        return chosen, g, counts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        chosen, g, counts = self.choose(flat)
        order = chosen.flatten().argsort()
        source = order // self.n_used
        parts = flat.bfloat16().index_select(0, source).split(counts.tolist())
        weights = zip(*(w.bfloat16().unbind(0) for w in (self.gate, self.up, self.down)), strict=True)
        rows = [
            F.linear(F.silu(F.linear(part, gate)) * F.linear(part, up), down)
            for part, (gate, up, down) in zip(parts, weights, strict=True)
        ]
        y = torch.cat(rows) * g.flatten()[order][:, None]
        routed = torch.zeros_like(flat).index_add(0, source, y.to(flat.dtype))
        return routed.view_as(x) + self.shared(x)


class Layer(nn.Module):
    def __init__(self, shape: Shape, draw: Draw, il: int) -> None:
        super().__init__()
        n, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
        self.head_dim = shape.head_dim
        self.norm_in, self.norm_post = Norm(shape.n_embd), Norm(shape.n_embd)
        self.q, self.k, self.v = (draw.matrix(rows, shape.n_embd) for rows in (n, kv, kv))
        self.o = draw.out_matrix(shape.n_embd, n)
        self.mlp = Mlp(shape, draw, shape.n_ff) if il < shape.n_dense else Experts(shape, draw)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        y = self.norm_in(x)
        q, k, v = (F.linear(y, w).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=True)
        x = x + F.linear(y.transpose(1, 2).flatten(-2), self.o)
        return x + self.mlp(self.norm_post(x))


class Model(nn.Module):
    """Logits of every position. Shapes: (n, n_ctx) -> (n, n_ctx, n_vocab)"""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        draw = Draw(shape, seed)
        self.head_dim = shape.head_dim
        self.embed = nn.Parameter(torch.randn(shape.n_vocab, shape.n_embd, generator=draw.generator) * 0.5)
        self.layers = nn.ModuleList(Layer(shape, draw, il) for il in range(shape.n_layer))
        self.norm = Norm(shape.n_embd)
        self.head = draw.matrix(shape.n_vocab, shape.n_embd)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        frequencies = 500000.0 ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(ids.shape[1])[:, None] * frequencies
        x = F.embedding(ids, self.embed)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return F.linear(self.norm(x), self.head)

    def experts(self) -> list[Experts]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]


def named_weights(model: Model) -> dict[str, np.ndarray]:
    """Weights under Baidu's names."""

    def array(x: torch.Tensor) -> np.ndarray:
        return np.ascontiguousarray(x.detach().float().numpy())

    out = {
        "model.embed_tokens.weight": array(model.embed),
        "model.norm.weight": array(model.norm.weight),
        "lm_head.weight": array(model.head),
    }
    for il, layer in enumerate(model.layers):
        name = f"model.layers.{il}"
        out[f"{name}.input_layernorm.weight"] = array(layer.norm_in.weight)
        out[f"{name}.post_attention_layernorm.weight"] = array(layer.norm_post.weight)
        for letter in "qkvo":
            out[f"{name}.self_attn.{letter}_proj.weight"] = array(getattr(layer, letter))
        mlp = layer.mlp
        if hasattr(mlp, "router"):
            out[f"{name}.mlp.gate.weight"] = array(mlp.router)
            out[f"{name}.mlp.moe_statics.e_score_correction_bias"] = array(mlp.bias)[None]
        for part in ("gate", "up", "down"):
            if hasattr(mlp, "router"):
                out[f"{name}.mlp.shared_experts.{part}_proj.weight"] = array(getattr(mlp.shared, part))
                for e, one in enumerate(array(getattr(mlp, part))):
                    out[f"{name}.mlp.experts.{e}.{part}_proj.weight"] = one
            else:
                out[f"{name}.mlp.{part}_proj.weight"] = array(getattr(mlp, part))
    return out
