"""What happens to the weights at a step: gradients are shared, rates set, experts balanced, running means kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed as dist
from torch import nn


class Team:
    """Worker processes that each take their own batches and share the mean gradient: on two cores with other work
    beside, one thread each wastes far less than two threads that wait for each other at every operation."""

    def __init__(self, rank: int, size: int, meeting_point: str):
        self.rank, self.size = rank, size
        if size > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)

    def share_gradients(self, parameters: list[nn.Parameter]) -> None:
        if self.size == 1:
            return
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.size
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)

    def share(self, values: list[torch.Tensor]) -> None:
        """Sum small tensors over the workers, in place."""
        if self.size > 1 and values:
            flat = torch.cat([value.flatten() for value in values])
            dist.all_reduce(flat)
            for value, total in zip(values, flat.split([value.numel() for value in values]), strict=True):
                value.copy_(total.view_as(value))

    def agree(self, value: float) -> float:
        """Return worker 0's value: all must stop at the same step."""
        tensor = torch.tensor([value])
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor.item()


class Balance:
    """Keeps the experts in use: a correction bias rises while its expert gets less than its share (no extra loss)."""

    def __init__(self, model: nn.Module):
        self.loads = {}
        self.routers = {n: m for n, m in model.named_modules() if n.endswith(("text_moe.gate", "vision_moe.gate"))}
        for name, router in self.routers.items():
            router.register_forward_hook(lambda _m, _i, out, name=name: self.loads.__setitem__(name, out[2]))

    @torch.no_grad()
    def step(self, rate: float, team: Team) -> None:
        counts = []
        for name, router in self.routers.items():
            chosen = self.loads.get(name, torch.empty(0, dtype=torch.long))
            counts.append(torch.bincount(chosen.flatten(), minlength=router.num_experts).float())
        team.share(counts)
        for count, router in zip(counts, self.routers.values(), strict=True):
            router.moe_statics.e_score_correction_bias += rate * torch.sign(count.mean() - count)
        self.loads.clear()


class Optimizer:
    """Muon for the plain matrices, AdamW for the rest (banks of experts, routers, embeddings, norms, biases).

    Measured on the tower alone: after 100 steps Muon has half of the kinds right, AdamW a third; after 200, 89 %.
    """

    def __init__(
        self, groups: list[tuple[list[nn.Parameter], float]], rate: float, plain_excepted: tuple[nn.Parameter, ...] = ()
    ):
        self.rate = rate
        self.parts: list[torch.optim.Optimizer] = []
        excepted = {id(p) for p in plain_excepted}
        plain = [
            ([p for p in ps if p.ndim == 2 and min(p.shape) >= 64 and id(p) not in excepted], scale)
            for ps, scale in groups
        ]
        taken = {id(p) for ps, _ in plain for p in ps}
        rest = [([p for p in ps if id(p) not in taken], scale) for ps, scale in groups]
        self.parts.append(
            torch.optim.Muon(
                [dict(params=ps, scale=s) for ps, s in plain], rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            )
        )
        self.parts.append(
            torch.optim.AdamW(
                [dict(params=ps, scale=s) for ps, s in rest], rate, weight_decay=0.02, betas=(0.9, 0.98), fused=True
            )
        )

    def step(self, factor: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * group["scale"] * factor
            part.step()
            part.zero_grad(set_to_none=True)


class Averages:
    """Running means of the weights: what is examined and saved."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.values: dict[str, torch.Tensor] = {}

    def update(self, step: int) -> None:
        decay = min(0.98, (step + 4) / (step + 40))
        for name, value in self.model.state_dict().items():
            if name not in self.values:
                self.values[name] = value.clone()
            elif value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has these weights, and does not train, until the end of the block."""
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.values)
        self.model.eval()
        yield
        self.model.train()
        self.model.load_state_dict(state)
