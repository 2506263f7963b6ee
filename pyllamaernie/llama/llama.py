"""`Llama`: a GGUF model behind the method names that llama-cpp-python made common, on upstream's own engine.

Here it is opened and closed; what it does is in `chat`, `completion` and `tokens`. Chat templates, sampling, reasoning
parsers and the prompt cache are upstream's; pictures are decoded by `media` and reach the projector unchanged. Any
number of threads may call one object. Engine options are upstream's server options.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from pyllamaernie import _core, log
from pyllamaernie.errors import PyllamaernieError
from pyllamaernie.gguf.header import check_text_model, read_header
from pyllamaernie.gguf.projector import find_projector, is_vision_model
from pyllamaernie.llama import engine, rpc
from pyllamaernie.llama.chat import Chat
from pyllamaernie.llama.completion import Completion
from pyllamaernie.llama.keywords import refuse_unknown
from pyllamaernie.llama.options import check_counts, embedded_model, engine_options
from pyllamaernie.llama.pretrained import pretrained_files
from pyllamaernie.llama.reasoning import Thinking

_open_models: weakref.WeakSet[Llama] = weakref.WeakSet()


class Llama(Chat, Completion):
    """A loaded model. Use it as a context manager, or call `close()`.

    `model_path`: a GGUF file; None is the embedded ernie-4.5-vl-tiny.
    `mmproj`: the projector for pictures; "auto" finds `mmproj-<model name>.gguf` beside the model, None is text only.
    `n_ctx`: None is the model's own context, capped so that its cache stays within an eighth of the free memory.
    `type_k`, `type_v`: KV cache type by name ("f32", "f16", "q8_0", ...) or ggml number; f32 for both also turns off
        flash attention unless `flash_attn` says otherwise, so that results are as exact as they can be.
    `n_gpu_layers`: None is all of them when a GPU backend is present.
    `rpc_servers`: workers (`host:port`) that hold the layers, spread over them by their memory; `pyllamaernie rpc`
        starts one. A worker that is missing or of another build is an RpcError; one that goes away fails every call.
    `seed`: default for calls without one; None draws a new one for each call.
    `chat_template`: Jinja text, a file, or the name of an upstream template; None takes the model's own.
    `verbose`: show the package's log on stderr at INFO.
    Raises: ModelNotFoundError, CorruptModelError, UnsupportedArchitectureError, ProjectorMismatchError,
        OutOfMemoryError, ModelLoadError; TypeError for an unknown keyword, InputError for a value that is not allowed.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        mmproj: str | os.PathLike[str] | None = "auto",
        n_ctx: int | None = None,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_gpu_layers: int | None = None,
        rpc_servers: str | Sequence[str] | None = None,
        use_mmap: bool = True,
        use_mlock: bool = False,
        offload_kqv: bool = True,
        flash_attn: bool | None = None,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        n_parallel: int = 1,
        cache_ram_mib: int = 0,
        image_min_tokens: int | None = None,
        image_max_tokens: int | None = None,
        seed: int | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_remote: bool = False,
        verbose: bool = False,
        **unknown: Any,
    ) -> None:
        given = locals()
        refuse_unknown("Llama", unknown, type(self).__init__)
        if verbose:
            _verbose()
        log.set_level()
        self._closed = True
        self._lock = threading.Lock()
        self._scorers = []
        self.verbose = verbose
        self.allow_remote = allow_remote
        check_counts(given)
        self._find_files(model_path, mmproj)
        self._image_tokens = image_min_tokens, image_max_tokens
        options = engine_options(given, self.header, self.projector)
        self.context_options = options.context
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        self._has_template = bool(options.template)
        self._thinking = Thinking(str(options.template), self.header.arch)
        self._open(options.args, rpc_servers)

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None = None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> Llama:
        """A model of a hub: `org/name`, `org/name:TYPE`, or `org/name` and the file that `filename` (a glob) fits.

        What is not on this disk is fetched (`local_dir`: under its own name into that folder; `cache_dir`: into
        another cache), all parts of a split file and the mmproj with it; a Hugging Face folder is converted and kept.
        `additional_files` are globs of more files to fetch. `local_dir_use_symlinks` has no effect, as in
        huggingface_hub. `options` are those of `Llama`.
        Raises: OfflineError, HubError, DiskSpaceError, ConvertError; what `Llama` raises.
        """
        model, mmproj = pretrained_files(repo_id, filename, additional_files or (), local_dir, cache_dir)
        if mmproj is not None:
            options.setdefault("mmproj", mmproj)
        return cls(model, **options)

    def _find_files(self, model_path: str | os.PathLike[str] | None, mmproj: str | os.PathLike[str] | None) -> None:
        self.header = read_header(embedded_model() if model_path is None else model_path)
        check_text_model(self.header)
        self.projector = find_projector(self.header, mmproj)
        if self.projector is None and mmproj == "auto" and is_vision_model(self.header):
            warnings.warn(
                f"{self.header.path.name} is a vision model but no mmproj file lies beside it: text only",
                UserWarning,
                stacklevel=3,
            )
        self.model_path = str(self.header.path)
        self.mmproj_path = None if self.projector is None else str(self.projector.path)
        self.metadata = dict(self.header.metadata)

    def _open(self, args: list[str], rpc_servers: str | Sequence[str] | None) -> None:
        self._rpc_servers = rpc.endpoints(rpc_servers) if rpc_servers else []
        args = [*args, *rpc.acquire(self._rpc_servers)]
        try:
            self.engine = engine.load(args, self.header)
        except BaseException:
            rpc.release(self._rpc_servers)
            raise
        self._closed = False
        _open_models.add(self)
        self._info = _core.model_info(self.engine)
        self._props = json.loads(self.engine.open("props", "{}").data)

    def close(self) -> None:
        """Free the model. Calls in other threads end with ClosedError; closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            _open_models.discard(self)
            for scorer in self._scorers:
                with scorer.lock:
                    scorer.close()
            self.engine.close()
            rpc.release(self._rpc_servers)
        log.drain()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _verbose() -> None:
    if not any(isinstance(handler, logging.StreamHandler) for handler in log.ROOT.handlers):
        log.log_to_stderr(logging.INFO)


@atexit.register
def _close_all() -> None:
    # native threads must not outlive the interpreter
    for model in list(_open_models):
        try:
            model.close()
        except (PyllamaernieError, RuntimeError):
            pass
