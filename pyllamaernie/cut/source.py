"""A GGUF model to cut, for `slice` and `prune`: its metadata, its tensors, and which of them belong to which experts.

Source: tensor and key names are llama.cpp's, src/llama-arch.cpp at the pin.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamaernie.errors import CorruptModelError, UnsupportedInputError

if TYPE_CHECKING:
    from pyllamaernie.gguf.file import InTensor, Key

# Layers -> kept experts, for each pool. A pool is a router and its experts; ERNIE VL has "text" and "vision".
Kept = Mapping[str, Mapping[int, Sequence[int]]]

# A correction bias that keeps an expert from being chosen. Source: native/overlay/src/models/pyllamaernie-experts.h
BIAS_REMOVED = -1e9

LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_PER_EXPERT = re.compile(
    r"ffn_(?:gate|up|down|gate_up)_exps(?P<a>_vl)?\.\w+|ffn_gate_inp(?P<b>_vl)?\.(?:weight|bias)"
    r"|exp_probs_b(?P<c>_vl)?(?:\.\w+)?"
)
_NOT_PER_EXPERT = re.compile(r"ffn_norm_exps\..+|ffn_gate_inp_shexp\..+")
_EXPERT_LIKE = re.compile(r"exps|exp_probs|gate_inp|tid2eid|ffn_(?:gate|up|down)\.\d+\.")


@dataclass(frozen=True)
class Source:
    """A GGUF model to cut: its metadata by name, and its tensors, mapped."""

    path: Path
    keys: Mapping[str, Key]
    tensors: Sequence[InTensor]

    @property
    def arch(self) -> str:
        return str(self.keys["general.architecture"].value)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key of the architecture's own section."""
        key = self.keys.get(f"{self.arch}.{name}")
        return default if key is None else key.value

    @property
    def n_layer(self) -> int:
        return int(self.get("block_count", 0))

    @property
    def n_next(self) -> int:
        """Layers at the end that predict further tokens."""
        return int(self.get("nextn_predict_layers", 0))

    @property
    def n_expert(self) -> int:
        return int(self.get("expert_count", 0))

    @property
    def n_stored(self) -> int:
        """Experts that the file holds of each layer; fewer than its routers have rows after `prune --exact`."""
        return int(self.get("expert_stored_count", self.n_expert))

    @property
    def n_expert_used(self) -> int:
        """Experts of a token; the most of any layer where the layers differ."""
        value = self.get("expert_used_count", 0)
        return int(max(value)) if isinstance(value, list) else int(value)

    @property
    def n_group(self) -> int:
        return max(1, int(self.get("expert_group_count", 1)))

    def pools(self) -> dict[str, list[int]]:
        """The layers of each expert pool, in order; empty for a dense model."""
        out: dict[str, list[int]] = {}
        for tensor in self.tensors:
            place = expert_place(self, tensor.name)
            if place is not None and tensor.name.endswith(
                "_exps_vl.weight" if place[1] == "vision" else "_exps.weight"
            ):
                layers = out.setdefault(place[1], [])
                if place[0] not in layers:
                    layers.append(place[0])
        return {name: sorted(layers) for name, layers in sorted(out.items())}

    def require_whole(self) -> None:
        """Raises: UnsupportedInputError when experts are gone already but their rows of the routers are not."""
        if self.n_stored != self.n_expert:
            raise UnsupportedInputError(
                f"{self.path} was pruned with whole routers ({self.n_stored} of {self.n_expert} experts); "
                "cut the file that it was made from"
            )

    def tensor(self, name: str) -> InTensor | None:
        return next((t for t in self.tensors if t.name == name), None)

    def down(self, pool: str, il: int) -> InTensor:
        """The down projection of a pool's experts in one layer. Raises: CorruptModelError when it is missing."""
        name = f"blk.{il}.ffn_down_exps{'_vl' if self.has_vision_pool(il) and pool == 'vision' else ''}.weight"
        tensor = self.tensor(name)
        if tensor is None:
            raise CorruptModelError(f"{self.path} has no {name}")
        return tensor

    def bias(self, pool: str, il: int) -> InTensor | None:
        """The correction bias of a pool's router in one layer, if it has one."""
        stem = f"blk.{il}.exp_probs_b{'_vl' if self.has_vision_pool(il) and pool == 'vision' else ''}"
        return self.tensor(f"{stem}.bias") or self.tensor(stem)

    def has_vision_pool(self, il: int) -> bool:
        """Without a router of its own, a `_vl` tensor serves the text experts."""
        return f"blk.{il}.ffn_gate_inp_vl.weight" in self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(t.name for t in self.tensors)


def open_source(path: str | os.PathLike[str]) -> Source:
    """A model file, its header checked.

    Raises: ModelNotFoundError, CorruptModelError, UnsupportedInputError (projector, part of a split model).
    """
    from pyllamaernie.gguf.file import read_gguf
    from pyllamaernie.gguf.header import read_header

    header = read_header(path)  # also finds a file that is cut short
    if header.is_projector or header.arch in ("", "imatrix"):
        raise UnsupportedInputError(f"{path} holds {header.arch or 'no model'!r}; a language model's GGUF is needed")
    if int(header.metadata.get("split.count", 0)) > 1:
        raise UnsupportedInputError(
            f"{path} is one of {header.metadata['split.count']} parts; "
            "join them with `pyllamaernie tool llama-gguf-split --merge`"
        )
    try:
        return Source(Path(path), *read_gguf(Path(path)))
    except (ValueError, KeyError, IndexError) as error:
        raise CorruptModelError(f"{path} cannot be read: {error}") from None


def expert_place(source: Source, name: str) -> tuple[int, str] | None:
    """(layer, pool) of a tensor whose outermost dimension counts experts, None for every other tensor.

    Raises: UnsupportedInputError for a tensor that has to do with experts in a way that is not known here.
    """
    layer = LAYER.fullmatch(name)
    if layer is None or not _EXPERT_LIKE.search(layer[2]) or _NOT_PER_EXPERT.fullmatch(layer[2]):
        return None
    tail = _PER_EXPERT.fullmatch(layer[2])
    if tail is None:
        raise UnsupportedInputError(f"{source.path}: {name} belongs to experts in a way that cannot be cut")
    is_vision = any(tail.groups()) and source.has_vision_pool(int(layer[1]))
    return int(layer[1]), "vision" if is_vision else "text"
