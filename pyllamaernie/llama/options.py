"""The keywords of Llama's constructor into the engine's options: cache types, chat templates, the embedded model.

Not the keywords of calls: those are `keywords`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllamaernie import _core
from pyllamaernie.errors import ChatTemplateError, InputError, ModelNotFoundError
from pyllamaernie.gguf.header import Header
from pyllamaernie.llama.context import ContextOptions, default_n_ctx
from pyllamaernie.llama.reasoning import ANSWER_END, ANSWER_START, KEEP_MARKS
from pyllamaernie.machine import installed, n_cpu

EMBEDDED_MODEL = "ernie-4.5-vl-tiny.gguf"

# what the engine accepts for the KV cache; bytes per value for the estimate of a default context
CACHE_TYPES = {
    "f32": 4.0,
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
    "iq4_nl": 18 / 32,
}

# whole numbers above 0, where given; n_ctx may be 0
COUNTS = ("n_batch", "n_ubatch", "n_parallel", "n_ctx", "n_threads", "n_threads_batch")
LOAD_MODES = {(True, False): "auto", (True, True): "mmap+mlock", (False, True): "mlock", (False, False): "none"}
FLASH_ATTN = {"auto": -1, "off": 0, "on": 1}  # llama.h's numbers


@dataclass(frozen=True)
class EngineOptions:
    """How one model is opened: the engine's command line, another context's options, and the chat template."""

    args: list[str]
    context: ContextOptions
    template: str | None


def engine_options(given: Mapping[str, Any], model: Header, mmproj: Header | None) -> EngineOptions:
    """The engine's options for the constructor's keywords. Raises: InputError, ChatTemplateError."""
    type_k, type_v = cache_type("type_k", given["type_k"]), cache_type("type_v", given["type_v"])
    n_threads = given["n_threads"] or n_cpu()
    n_ubatch = min(given["n_ubatch"], given["n_batch"])
    # n_ctx 0 means "from the model" in upstream's and llama-cpp-python's options
    n_ctx = given["n_ctx"] or default_n_ctx(model, (CACHE_TYPES[type_k] + CACHE_TYPES[type_v]) / 2)
    template = template_text(given["chat_template"]) or model.metadata.get("tokenizer.chat_template")
    flash_attn = given["flash_attn"]
    if flash_attn is None and {type_k, type_v} == {"f32"}:
        flash_attn = False  # the CPU kernel sums in half precision: 3e-3 of the logits' deviation instead of 5e-6
    flash = "auto" if flash_attn is None else "on" if flash_attn else "off"
    n_gpu_layers = given["n_gpu_layers"]
    options = {
        "--model": model.path,
        "--mmproj": None if mmproj is None else mmproj.path,
        "--ctx-size": n_ctx,
        "--batch-size": given["n_batch"],
        "--ubatch-size": n_ubatch,
        "--threads": n_threads,
        "--threads-batch": given["n_threads_batch"] or n_threads,
        "--parallel": given["n_parallel"],
        "--flash-attn": flash,
        "--cache-type-k": type_k,
        "--cache-type-v": type_v,
        "--load-mode": LOAD_MODES[given["use_mmap"], given["use_mlock"]],
        "--n-gpu-layers": (-1 if _core.supports_gpu_offload() else 0) if n_gpu_layers is None else n_gpu_layers,
        "--cache-ram": given["cache_ram_mib"],
        "--fit": "off",
        "--seed": given["seed"],
        "--chat-template": template and engine_template(template),
        "--rope-freq-base": given["rope_freq_base"] or None,
        "--rope-freq-scale": given["rope_freq_scale"] or None,
        "--image-min-tokens": given["image_min_tokens"],
        "--image-max-tokens": given["image_max_tokens"],
    }
    args = [str(word) for option in options.items() if option[1] is not None for word in option]
    args += ["--no-warmup", "--jinja", *([] if given["offload_kqv"] else ["--no-kv-offload"])]
    context: ContextOptions = {
        "n_batch": given["n_batch"],
        "n_ubatch": n_ubatch,
        "n_threads": n_threads,
        "type_k": _core.GGML_TYPES[type_k],
        "type_v": _core.GGML_TYPES[type_v],
        "flash_attn": FLASH_ATTN[flash],
    }
    return EngineOptions(args, context, template)


def check_counts(given: Mapping[str, Any]) -> None:
    """Raise InputError for a number of tokens, threads or conversations that is none."""
    for name in COUNTS:
        value = given[name]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 0 or (value == 0 and name != "n_ctx")
        ):
            raise InputError(f"{name} is a positive whole number, got {value!r}")


def embedded_model() -> Path:
    """The file of the model that the package carries. Raises: ModelNotFoundError when this build has none."""
    path = installed("data") / EMBEDDED_MODEL
    if not path.is_file():
        raise ModelNotFoundError(
            f"this build carries no embedded model ({path} is missing); give the path of a GGUF file"
        )
    return path


def cache_type(name: str, value: str | int | None) -> str:
    """The name of a KV cache type given by name or ggml number."""
    if value is None:
        return "f16"
    names = {number: word for word, number in _core.GGML_TYPES.items()}
    word = names.get(value) if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()
    if word not in CACHE_TYPES:
        allowed = ", ".join(f"{word} ({_core.GGML_TYPES[word]})" for word in CACHE_TYPES)
        raise InputError(f"{name} is a KV cache type, got {value!r}; allowed: {allowed}")
    return word


def template_text(template: str | os.PathLike[str] | None) -> str | None:
    """A chat template given as text, as a file or by the name of an upstream one."""
    if template is None:
        return None
    text = os.fspath(template)
    if isinstance(template, os.PathLike) or ("{" not in text and "\n" not in text and os.path.isfile(text)):
        try:
            return Path(text).read_text(encoding="utf-8")
        except OSError as error:
            raise ChatTemplateError(f"the chat template {text} cannot be read: {error.strerror or error}") from error
    return text


def engine_template(template: str) -> str:
    """The template in a form from which the engine can learn how an answer is built; its prompts stay the same."""
    template = _with_explicit_generation_prompt(template)
    if ANSWER_START in template:
        # the engine would insist on these marks in every answer; they are shown only when a call asks for them
        shown = f"page if {KEEP_MARKS} is defined else page"
        for mark in (ANSWER_START + "\\n", "\\n" + ANSWER_END + "\\n"):
            shown += f" | replace('{mark}', '')"
        template = "{% set page %}" + template + "{% endset %}{{ " + shown + " }}"
    return template


def _with_explicit_generation_prompt(template: str) -> str:
    """A template that opens an answer exactly when add_generation_prompt is true.

    ERNIE's templates take an undefined add_generation_prompt as true, the engine means false by it; the one of
    ERNIE-4.5-21B-A3B-Thinking never asks. The engine renders both ways to learn what opens an answer: without a
    difference it cannot tell thoughts from the answer.
    """
    if re.search(r"add_generation_prompt\s+is\s+(not\s+)?defined", template):
        return (
            "{%- set add_generation_prompt = add_generation_prompt is defined and add_generation_prompt -%}" + template
        )
    if "add_generation_prompt" in template:
        return template
    ends = list(re.finditer(r"\{%-?\s*endfor\s*(-?%\})", template))
    tail = template[ends[-1].end() :].removesuffix("\n") if ends else ""
    if "{{" not in tail or "{%" in tail:
        return template
    condition = "{% if add_generation_prompt is defined and add_generation_prompt " + ends[-1][1]
    return template[: ends[-1].end()] + condition + tail + "{% endif %}"
