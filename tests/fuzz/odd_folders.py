"""Small checkpoints of every family, and what may be wrong with such a folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import checkpoints
import odd_json
import two_bit
from checkpoint_shapes import Shape

_SMALL = {
    "n_embd": 64, "n_head": 2, "n_head_kv": 1, "head_dim": 32, "n_layer": 2, "n_ff": 64, "n_expert": 4,
    "n_expert_used": 2, "n_shared": 1, "n_ff_exp": 32, "n_ff_exp_vl": 32, "section_t": 4, "v_depth": 1, "v_width": 32,
    "v_head": 2, "v_ff": 64,
}  # fmt: skip
SMALL = Shape(**_SMALL)
# name -> (kind, options of write_checkpoint)
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"dtype": "BF16", "use_bias": True}),
    "dense-shards": ("dense", {"shards": 3, "tied": False, "names": "baidu"}),
    "moe": ("moe", {"dtype": "BF16", "shape": Shape(**_SMALL, n_mtp=1)}),
    "moe-fused": ("moe", {"names": "memory", "dtype": "F16"}),
    "moe-flat": ("moe", {"names": "fused", "flat": True, "shards": 2}),
    "vl": ("vl", {"dtype": "BF16"}),
    "vl-flat": ("vl", {"flat": True, "names": "baidu", "dtype": "BF16"}),
    "vl-shards": ("vl", {"names": "memory", "shards": 2}),
}
TWO_BIT = "two-bit"
NAMES = (*_BASES, TWO_BIT)
_CARD = (
    "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\ntags:\n- ERNIE4.5\nbase_model:\n- org/Toy-Base\n---\n\n# Toy\n"
)
_NUMBERS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "head_dim"),
    *("intermediate_size", "moe_k", "moe_num_experts", "moe_intermediate_size", "moe_num_shared_experts"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "num_nextn_predict_layers"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "freq_allocation", "mlp_layer_types", "model_type"),
    *("depth", "num_heads", "patch_size", "in_channels", "mlp_ratio", "embed_dim", "spatial_merge_size", "use_bias"),
    *("image_start_token_id", "tie_word_embeddings", "text_config", "vision_config", "rope_parameters"),
)
_SHALLOW = (
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)


def write_bases(home: Path) -> None:
    """The sound folders, one for each name, `original` beside that of the 2-bit release."""
    for name, (kind, options) in _BASES.items():
        folder = checkpoints.write_checkpoint(home / name, kind, **{"shape": SMALL, **options})
        (folder / "README.md").write_text(_CARD)
    two_bit.write_original(home / "original")
    two_bit.write_release(home / TWO_BIT, two_bit.encoded_experts())


@dataclass
class Odd:
    """A folder that is being made odd; unchanged files are links to those of the sound one."""

    random: Random
    path: Path

    def files(self, *ends: str) -> list[Path]:
        found = (path for path in sorted(self.path.rglob("*")) if path.name.endswith(ends or ("",)))
        return [path for path in found if path.is_file()]

    def pick(self, *ends: str) -> Path:
        return self.random.choice(self.files(*ends) or self.files())

    def read(self, path: Path) -> bytes:
        if not path.is_file() or path.stat().st_size > 2**26:
            raise ValueError(f"{path} is no file any more, or one of the large ones")
        return path.read_bytes()

    def write(self, path: Path, data: bytes) -> None:
        path.unlink(missing_ok=True)  # the link, not the file
        path.write_bytes(data)


def link_folder(sound: Path, path: Path) -> None:
    shutil.copytree(sound, path, copy_function=os.link)


# ---- one change each


def json_file(odd: Odd) -> None:
    path = odd.pick(".json")
    odd.write(path, odd_json.odd_json(odd.random, odd.read(path)))


def config(odd: Odd) -> None:
    path = odd.path / "config.json"
    odd.write(path, odd_json.odd_json(odd.random, odd.read(path)))


def config_number(odd: Odd) -> None:
    """One of the keys that a conversion reads, where it is or where it is not."""
    path = odd.path / "config.json"
    value = json.loads(odd.read(path))
    homes = [value, *(value[key] for key in ("text_config", "vision_config") if isinstance(value.get(key), dict))]
    key = odd.random.choice(_NUMBERS)
    home = next((home for home in homes if key in home), odd.random.choice(homes))
    old = home.get(key)
    near = (old + 1, old - 1, 2 * old, old * 1000) if type(old) is int else ()
    home[key] = odd.random.choice((*near, *odd_json.VALUES))
    odd.write(path, odd_json.text_of(value))


def other_json(odd: Odd) -> None:
    """A file that may be there beside the others: odd values of keys that are read from it."""
    pick = odd.random.choice
    values = {
        "generation_config.json": {k: pick(odd_json.VALUES) for k in ("top_k", "top_p", "temperature", "sequence")},
        "processor_config.json": {"image_processor": pick(odd_json.VALUES), "video_processor": pick(odd_json.VALUES)},
        "preprocessor_config.json": {
            "size": pick((pick(odd_json.VALUES), {"shortest_edge": pick(odd_json.VALUES)})),
            "image_mean": pick(odd_json.VALUES),
            "image_std": pick(((1, 1, 1), pick(odd_json.VALUES))),
        },
        "video_preprocessor_config.json": {"min_pixels": pick(odd_json.VALUES), "max_pixels": pick(odd_json.VALUES)},
        "added_tokens.json": {"<|x|>": pick(odd_json.VALUES), "<|y|>": 500},
        "special_tokens_map.json": {k: pick(odd_json.VALUES) for k in ("bos_token", "additional_special_tokens")},
        "chat_template.json": {"chat_template": pick(odd_json.VALUES)},
        "tokenizer.json": {"model": pick(odd_json.VALUES), "added_tokens": pick(odd_json.VALUES)},
        "model.safetensors.index.json": {"weight_map": pick(odd_json.VALUES)},
    }
    name = pick(sorted(values))
    whole = odd.random.random() < 0.2
    odd.write(odd.path / name, odd_json.text_of(pick(odd_json.VALUES) if whole else values[name]))


def tokenizer_json(odd: Odd) -> None:
    """A tokenizer.json that is nearly one."""
    vocab = {chr(97 + i): i for i in range(20)} | {"ab": 20, "<unk>": 21}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocab, "merges": [["a", "b"]]}
    steps = {"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}, "pre_tokenizer": None}
    added = [{"id": 22, "content": "<|x|>", "special": True}]
    text = json.dumps({"model": model, **steps, "added_tokens": added}).encode()
    odd.write(odd.path / "tokenizer.json", odd_json.odd_json(odd.random, text))
    if odd.random.random() < 0.5:
        (odd.path / "tokenizer.model").unlink(missing_ok=True)


def header(odd: Odd) -> None:
    """The header of a safetensors file, or the eight bytes before it."""
    path = odd.pick(".safetensors")
    data = odd.read(path)
    n = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + n], data[8 + n :]
    what = odd.random.random()
    if what < 0.15:
        n = odd.random.choice((0, 1, n - 1, n + 1, len(data), 2**31, 2**63, 2**64 - 1))
        odd.write(path, n.to_bytes(8, "little") + data[8:])
        return
    if what < 0.35:
        head = odd_json.odd_json(odd.random, head)
    else:
        head = odd_json.text_of(_odd_entries(odd.random, json.loads(head)))
    head += b" " * (-len(head) % 8)
    odd.write(path, len(head).to_bytes(8, "little") + head + rest)


def _odd_entries(random: Random, entries: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in entries if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = entries[name]
    begin, end = entry["data_offsets"]
    choices: dict[str, Any] = {
        "dtype": random.choice(("F64", "I64", "F8_E4M3", "bf16", "BOOL", *odd_json.VALUES)),
        "shape": random.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [*entry["shape"], 0], [-n for n in entry["shape"]],
             [2**40] * 4, [2] * 5000, *odd_json.VALUES)
        ),
        "data_offsets": random.choice(
            (entries[other]["data_offsets"], [end, begin], [-8, end - begin - 8], [begin + 2**40, end + 2**40],
             [begin + 1, end + 1], [begin - 4, end - 4], [begin], [begin, end, end], *odd_json.VALUES)
        ),
    }  # fmt: skip
    key = random.choice(("dtype", "shape", "data_offsets", "data_offsets", "entry", "drop", "name", "extra"))
    if key in choices:
        entry[key] = choices[key]
    elif key == "entry":
        entries[name] = random.choice(odd_json.VALUES)
    elif key == "drop":
        del entries[name]
    elif key == "name":
        odd = (other, f"{name}\n", f"{name}.{'x' * 2000}", "../x", "@half@", "model.layers.99999999.mlp.x", "")
        entries[random.choice(odd)] = entries.pop(name)
    else:
        entries[f"model.layers.{random.choice((2, 511, 10**6))}.{name.rpartition('layers.')[2]}"] = dict(entry)
    return entries


def weights(odd: Odd) -> None:
    """NaN, infinity or noise among the data, or fewer or more bytes of it."""
    path = odd.pick(".safetensors")
    data = bytearray(odd.read(path))
    start = 8 + int.from_bytes(data[:8], "little")
    what = odd.random.random()
    if what < 0.6 and start + 8 < len(data):
        at = start + odd.random.randrange(len(data) - start - 8) // 4 * 4
        data[at : at + 4] = struct.pack("<f", odd.random.choice((float("nan"), float("inf"), float("-inf"), 3e38)))
    elif what < 0.8:
        del data[odd.random.randrange(len(data)) :]
    else:
        data += bytes(odd.random.choice((1, 8, 10**5)))
    odd.write(path, bytes(data))


def kind_of_file(odd: Odd) -> None:
    """Something else in the place of a file, or in a place where a file may be."""
    names = ("README.md", "chat_template.jinja", "tokenizer.json", "generation_config.json", "model-x.safetensors")
    more = [odd.path / name for name in (*names, "model.safetensors.index.json", "additional_chat_templates/x.jinja")]
    path = odd.pick() if odd.random.random() < 0.6 else odd.random.choice(more)
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    what = odd.random.choice(("pipe", "folder", "nowhere", "itself", "/dev/zero", "/dev/tty", "large", "gone", "noise"))
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "large":  # a hole that takes no disk
        with open(path, "wb") as file:
            file.truncate(odd.random.choice((2**25 + 1, 2**32)))
    elif what == "noise":
        path.write_bytes(odd.random.randbytes(odd.random.choice((1, 100, 10**5))))
    elif what != "gone":
        path.symlink_to({"nowhere": "no-such-file", "itself": path.name}.get(what, what))


def weight_map(odd: Odd) -> None:
    """An index whose files are elsewhere."""
    index = odd.path / "model.safetensors.index.json"
    found = json.loads(odd.read(index)) if index.is_file() else {"weight_map": {}}
    file = next(iter(path.name for path in odd.files(".safetensors")), "model.safetensors")
    names = list(found["weight_map"]) or ["model.norm.weight", "model.embed_tokens.weight"]
    where = (
        *(f"../{odd.path.name}/{file}", str(odd.path / file), f"./{file}", f"x/../{file}", "/dev/zero", "config.json"),
        *(f"{file}\0", "", ".", "..", "no-such.safetensors", "\udc80.safetensors", *odd_json.VALUES),
    )
    for name in odd.random.sample(names, odd.random.randint(1, len(names))):
        found["weight_map"][name] = odd.random.choice(where)
    odd.write(index, odd_json.text_of(found))


def card(odd: Odd) -> None:
    """A model card whose head is no YAML, other YAML, or YAML that grows."""
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    heads = (
        "license: [a, [b]]", "license: [a, b]", "license: {a: b}", "tags: {a: 1}", "language: no",
        "tags: [1, no, null]", "base_model: 5",
        "base_model: [{name: [1]}, 3]", "datasets: [[1]]", "version: 4.5", "name: 2020-01-01", 'name: "\\ud800"',
        "a: b: c", "\t- x", "- a\n- b", "name: ''", f"{bomb}license: *u",
        f"name: {'x' * 70000}", "[" * 3000, "? [a]\n: b", "license: !!python/x y",
        "model_name: /-/-", "base_model: https://huggingface.co/a/b", "base_model: ''", "tags: []", "name: \u0085x",
    )  # fmt: skip
    odd.write(odd.path / "README.md", f"---\n{odd.random.choice(heads)}\n---\ntext\n".encode("utf-8", "surrogatepass"))


def template(odd: Odd) -> None:
    texts = (b"\xff\xfe", b"{{", b"", b"x" * 10**6, b"{% for a in b %}", "{{ '\u2028' }}".encode())
    name = odd.random.choice(("chat_template.jinja", "additional_chat_templates/tool.jinja"))
    (odd.path / name).parent.mkdir(exist_ok=True)
    odd.write(odd.path / name, odd.random.choice(texts))


def pieces(odd: Odd) -> None:
    """The sentencepiece model: bytes changed, cut, or fields that are too long."""
    path = odd.path / "tokenizer.model"
    if not path.is_file():
        return
    data, random = bytearray(odd.read(path)), odd.random
    what = random.randrange(6)
    if what == 0:
        for _ in range(random.choice((1, 3, 30))):
            data[random.randrange(len(data))] = random.randrange(256)
    elif what == 1:
        del data[random.randrange(len(data)) :]
    elif what == 2:
        data[:0] = b"\xff" * random.choice((9, 20, 10**6))
    elif what == 3:
        data += b"\x0a" + _varint(random.choice((2**31, 2**63, 2**70)))
    elif what == 4:
        text = b"a" * 200_000
        piece = b"\x0a" + _varint(len(text)) + text
        data += b"\x0a" + _varint(len(piece)) + piece
    else:
        data += b"\x0a\x03\x0a\x01b" * random.choice((3, 20, 10**5))
    odd.write(path, bytes(data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def many(odd: Odd) -> None:
    """A file that is well formed and far too large."""
    value: Any = odd.random.choice(
        ({f"k{i}": i for i in range(200_000)}, {"a": [[]] * 1_200_000}, {"a": [0] * 2_000_000})
    )
    if odd.random.random() < 0.5:
        odd.write(odd.path / odd.random.choice((*_SHALLOW, "config.json")), json.dumps(value).encode())
        return
    head = json.dumps({f"t{i}": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]} for i in range(50_000)}).encode()
    odd.write(odd.pick(".safetensors"), len(head).to_bytes(8, "little") + head + bytes(4))


def nothing(odd: Odd) -> None:
    """A sound folder, which must still convert."""


CHANGES: tuple[tuple[Callable[[Odd], None], int], ...] = (
    *((header, 22), (config, 16), (config_number, 16), (json_file, 10), (other_json, 10), (kind_of_file, 8)),
    *(
        (tokenizer_json, 5),
        (weights, 6),
        (weight_map, 5),
        (card, 4),
        (template, 2),
        (pieces, 4),
        (many, 1),
        (nothing, 2),
    ),
)


def write_odd(random: Random, bases: Path, home: Path) -> tuple[Path, Path | None, list[str]]:
    """An odd folder below `home`, the original that goes with it if it is of 2 bits, and what was done to it."""
    name = random.choice((*_BASES, *_BASES, TWO_BIT))
    ending = b"\xff\xfe" if random.random() < 0.02 else b""  # a name that is not UTF-8
    path = Path(os.fsdecode(os.fsencode(home / name) + ending))
    link_folder(bases / name, path)
    original = None
    if name == TWO_BIT:
        original = home / "original"
        link_folder(bases / "original", original)
    odd, done = Odd(random, path), [name]
    if original is not None and random.random() < 0.3:
        odd = Odd(random, original)
    changes, shares = zip(*CHANGES, strict=True)
    for change in random.choices(changes, shares, k=random.choice((1, 1, 1, 1, 2, 3))):
        try:
            change(odd)
            done.append(change.__name__)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            done.append(f"{change.__name__}, not possible")  # after what was done before
    return path, original, done
