"""Every layout in which an ERNIE tokenizer comes, with the same 501 tokens, and texts to hold tokenizers against.

As in the released models the vision markers are no pieces: they are listed beside the vocabulary and count on from its
end. What transformers 4.54 and 5.24 save was seen by saving with each; the forms are written here, so that one version
is enough to test them. `python tests/support/layouts.py --table` (with transformers) prints what becomes of each.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
from tiny_vocabulary import CHAT_TEMPLATE, CONTROL, MARKERS, NORMAL, UNKNOWN, USER_DEFINED, pieces, sentencepiece_model

VISION = tuple(text for text in MARKERS if "IMAGE" in text or "VIDEO" in text)
PIECES = tuple(row for row in pieces() if row[0] not in VISION)
# in Baidu's order: the picture's placeholder is the first id behind the pieces
LISTED = (
    "<|IMAGE_PLACEHOLDER|>",
    "<|AUDIO_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "<|VIDEO_PLACEHOLDER|>",
)
IDS = {text: i for i, text in enumerate([*(text for text, _, _ in PIECES), *LISTED])}
NAMED = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}
Files = dict[str, Any]


def _config(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        **NAMED,
        **more,
    }


def _entry(text: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **flags, "special": special}


def _added(*, visible: bool = True) -> dict[int, dict[str, Any]]:
    """By id; `visible`: the user-defined pieces that have no name among them."""
    named = set(NAMED.values())
    rows = {i: text for i, (text, _, kind) in enumerate(PIECES) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    rows |= {IDS[text]: text for text in LISTED}
    wanted = {i: text for i, text in rows.items() if visible or text in named or text in LISTED}
    return {i: _entry(text, special=text in named or text in LISTED) for i, text in wanted.items()}


def decoder() -> dict[str, Any]:
    """`added_tokens_decoder` as 4.54 writes it."""
    return {str(i): entry for i, entry in _added().items()}


def _merges(taking_part: set[int], *, longest_first: bool) -> list[list[str]]:
    """All pairs of pieces whose sum is a piece, best score first; of one sum by the length of the left one."""
    known = {text for text, _, kind in PIECES if kind in taking_part}
    found = []
    for text, score, kind in PIECES:
        for cut in range(1, len(text)) if kind in taking_part else ():
            if {text[:cut], text[cut:]} <= known:
                found.append((-score, -cut if longest_first else cut, [text[:cut], text[cut:]]))
    return [pair for _, _, pair in sorted(found, key=lambda row: row[:2])]


def tokenizer_json(form: str) -> dict[str, Any]:
    """As transformers saves it: "4.54"; "5" for LlamaTokenizer (VL models); "5 text" for the class of text models."""
    replace = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}],
    }
    whole = sorted((text for text, _, kind in PIECES if kind == USER_DEFINED), key=len, reverse=True)
    split = {"type": "Split", "pattern": {"Regex": "|".join(map(re.escape, whole))}, "behavior": "Isolated"}
    normalizer, pre_tokenizer = {
        "4.54": (replace, None),
        "5": (None, {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}),
        "5 text": (replace, {"type": "Sequence", "pretokenizers": [{**split, "invert": False}]}),
    }[form]
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **entry} for i, entry in _added(visible=form != "5 text").items()],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [*steps, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if form == "5" else "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": form == "5 text",
            "vocab": {text: i for i, (text, _, _) in enumerate(PIECES)},
            "merges": _merges(
                {NORMAL} if form == "5 text" else {NORMAL, USER_DEFINED, CONTROL}, longest_first=form == "4.54"
            ),
        },
    }


def _baidu(kind: str) -> Files:
    """The model file, and a list of further tokens."""
    template = CHAT_TEMPLATE[kind == "vl"]
    return {"tokenizer_config.json": _config(kind, additional_special_tokens=list(LISTED), chat_template=template)}


def _map(kind: str) -> Files:
    """The list in special_tokens_map.json only."""
    return {
        "tokenizer_config.json": _config(kind, chat_template=CHAT_TEMPLATE[kind == "vl"]),
        "special_tokens_map.json": {**NAMED, "additional_special_tokens": list(LISTED)},
    }


def _added_file(kind: str) -> Files:
    return {**_map(kind), "added_tokens.json": {text: IDS[text] for text in sorted(LISTED)}}


def _tf454(kind: str) -> Files:
    """All that 4.54 saves but for tokenizer.json: as its slow class does."""
    config = _config(kind, added_tokens_decoder=decoder(), additional_special_tokens=list(LISTED))
    return {
        **_added_file(kind),
        "tokenizer_config.json": {**config, "extra_special_tokens": {}, "sp_model_kwargs": {}},
        "chat_template.jinja": CHAT_TEMPLATE[kind == "vl"],
    }


def _tf454_fast(kind: str) -> Files:
    return {**_tf454(kind), "tokenizer.json": tokenizer_json("4.54")}


def _tf454_json(kind: str) -> Files:
    """From a tokenizer.json without a model file."""
    return {**_tf454_fast(kind), "tokenizer.model": None}


def _tf5(kind: str) -> Files:
    config = _config(kind, extra_special_tokens=list(LISTED), backend="tokenizers", is_local=True)
    if kind != "vl":
        config["tokenizer_class"] = "TokenizersBackend"
    for name in ("add_bos_token", "add_eos_token"):
        del config[name]
    return {
        "tokenizer.model": None,
        "tokenizer.json": tokenizer_json("5" if kind == "vl" else "5 text"),
        "tokenizer_config.json": config,
        "chat_template.jinja": CHAT_TEMPLATE[kind == "vl"],
    }


def _tf520(kind: str) -> Files:
    """What 5.20 made of 4.54's; of a text model it keeps the steps of its tokenizer.json."""
    return _tf5(kind) if kind == "vl" else {**_tf5(kind), "tokenizer.json": tokenizer_json("4.54")}


def _tf5_named(kind: str) -> Files:
    """The markers as names of the tokenizer, which the processor of the VL model asks for."""
    names = ("image_token", "audio_token", "image_start_token", "image_end_token", "video_start_token")
    markers = dict(zip([*names, "video_end_token", "video_token"], LISTED, strict=True))
    files = _tf5(kind)
    files["tokenizer_config.json"]["extra_special_tokens"] = []
    files["tokenizer_config.json"].update(model_specific_special_tokens=markers, **markers)
    return files


LAYOUTS: dict[str, Callable[[str], Files]] = {
    "Baidu's list": _baidu,
    "special_tokens_map.json": _map,
    "added_tokens.json": _added_file,
    "4.54, slow": _tf454,
    "4.54": _tf454_fast,
    "4.54, tokenizer.json": _tf454_json,
    "5.20": _tf520,
    "5.24": _tf5,
    "5.24, named markers": _tf5_named,
}
# transformers 5.24 loses all of this list (4.54 does not): the ids of "Baidu's list" are those of 4.54 here
LOST_IN_5 = ("special_tokens_map.json",)
# of the list alone its class for VL models, and until 5.24 that for text models, loses the user-defined pieces that are
# longer than a character; 4.54 does not
THINK_LOST_IN_5 = ("Baidu's list",)


def write_layout(folder: Path, kind: str, layout: str) -> Path:
    """A whole checkpoint with the tokenizer in the layout."""
    checkpoints.write_checkpoint(folder, kind)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: _moved(name, value) for name, value in config.items()}))
    write_files(folder, LAYOUTS[layout](kind))
    return folder


def _moved(name: str, value: Any) -> Any:
    """The id of a marker in this vocabulary, for the one that it has in the other."""
    is_marker = name == "im_patch_id" or re.fullmatch(r"(image|video)_(start_|end_)?token_id", name)
    return IDS[pieces()[value][0]] if is_marker else value


def write_files(folder: Path, files: Files) -> None:
    """Puts tokenizer files into a checkpoint's folder in place of its own; None leaves one out."""
    for path in (*folder.glob("tokenizer*"), *folder.glob("*tokens*.json"), *folder.glob("chat_template*")):
        path.unlink()
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    for name, value in {"tokenizer.model": sentencepiece_model(rows=PIECES), **files}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif value is not None:
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


_WORDS = (
    *(
        "the picture",
        "User: ",
        "Assistant: ",
        "What colour is the circle?",
        "int main() {\n\treturn 0;\n}",
        "def f(x):",
    ),
    *("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4e2d\u6587\u5b57\u7b26", "\u65e5\u672c\u8a9e", "\u0440\u0443\u0441"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u2581", "e\u0301", "\ufffd", "\ue000", "\u00a0"),
    *("0123456789", "3.14159", "x1", "\n\n", "\t", " ", "  ", "        ", "<0xE4>", "<|IMAGE_", "|>", "<think", "\r\n"),
)


def texts(n: int = 2000, *, seed: int = 10, think: bool = True) -> list[str]:
    """Chinese, code, emoji, digits, markers, blanks in front and in rows, and characters that are no pieces."""
    rng = random.Random(seed)
    markers = [text for text in (*MARKERS, *LISTED, "<s>", "</s>") if think or "think" not in text]
    out = []
    for _ in range(n):
        parts = [" " * rng.choice((0, 0, 1, 2, 9))]
        for _ in range(rng.randint(1, 12)):
            draw = rng.random()
            if draw < 0.55:
                parts.append(rng.choice(_WORDS))
            elif draw < 0.75:
                parts.append(rng.choice(markers))
            else:
                parts.append(
                    "".join(chr(rng.choice((rng.randint(9, 0x7E), rng.randint(0xA0, 0xD7FF)))) for _ in range(4))
                )
            parts.append(rng.choice(("", "", " ")))
        text = "".join(parts)
        out.append(text if think else text.replace("think", "thank"))
    return out


def compare(folder: Path, kind: str, layout: str, n: int = 2000) -> dict[str, str]:
    """What transformers and our GGUF make of one layout: texts with equal ids, markers, template."""
    from transformers import AutoTokenizer

    from pyllamaernie import Llama
    from pyllamaernie.convert import convert

    theirs = AutoTokenizer.from_pretrained(write_layout(folder, kind, layout))
    model = convert(folder, folder / "x.gguf", type="f16", overwrite=True, mmproj=False).model
    with Llama(model, mmproj=None, n_ctx=512) as ours:
        some = texts(n, think=layout not in THINK_LOST_IN_5)
        equal = [
            theirs.encode(text, add_special_tokens=False) == ours.tokenize(text, add_bos=False, special=True)
            for text in some
        ]
        markers = [ours.tokenize(text, add_bos=False, special=True) == [IDS[text]] for text in LISTED]
        return {
            "ids equal": f"{sum(equal)}/{n}",
            "markers": f"{sum(markers)}/{len(LISTED)}",
            "template": "same" if ours.metadata.get("tokenizer.chat_template") == theirs.chat_template else "differs",
        }


def _table() -> None:
    import tempfile

    print(f"{'layout':26} {'model':6} {'ids equal':10} {'markers':8} template")
    for layout in LAYOUTS:
        for kind in ("dense", "vl"):
            with tempfile.TemporaryDirectory() as folder:
                found = compare(Path(folder) / "m", kind, layout)
            print(f"{layout:26} {kind:6} {found['ids equal']:10} {found['markers']:8} {found['template']}", flush=True)


if __name__ == "__main__":
    import sys

    if sys.argv[1:] != ["--table"]:
        sys.exit("usage: layouts.py --table")
    _table()
