"""Types of the compiled module (native/bindings). Text that may not be valid UTF-8 is bytes."""

from typing import Any

import numpy as np
import numpy.typing as npt

GGML_TYPES: dict[str, int]

class LoadedModel: ...

class Engine(LoadedModel):
    """Upstream's server engine, started with server options; raises RuntimeError when the model does not load."""

    def __init__(self, args: list[str]) -> None: ...
    def open(self, route: str, body: str) -> Stream:
        """Routes: chat/completions, completions, apply-template, tokenize, detokenize, props. All JSON."""
    def close(self) -> None: ...

class Stream:
    """An answer: `data` when it is whole, else `next()` until None. Dropping it cancels the request."""

    @property
    def status(self) -> int: ...
    @property
    def data(self) -> bytes: ...
    def next(self) -> bytes | None: ...
    def close(self) -> None: ...

class MediaChunk:
    """A preprocessed picture or video: rows of the decoder, and how far it moves the position."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def n_pos(self) -> int: ...
    def pixels(self) -> npt.NDArray[np.float32]:
        """As the tower sees them. Shapes: (n_frames, height, width, 3), normalized."""

class Session:
    """A second context on an engine's weights; `trace` records the nodes of each decode."""

    def __init__(
        self,
        engine: LoadedModel,
        *,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int,
        n_threads: int,
        type_k: int,
        type_v: int,
        flash_attn: int,
        trace: bool,
    ) -> None: ...
    def close(self) -> None: ...
    def load_projector(self, path: str, n_threads: int, use_gpu: bool) -> None: ...
    def tokenize_image(self, rgb: npt.NDArray[np.uint8]) -> MediaChunk: ...
    def tokenize_video(self, rgb: npt.NDArray[np.uint8]) -> MediaChunk: ...
    def encode(self, chunk: MediaChunk) -> npt.NDArray[np.float32]: ...
    def decode_tokens(self, tokens: npt.NDArray[np.int32], pos: int) -> npt.NDArray[np.float32]: ...
    def decode_media(self, chunk: MediaChunk, embd: npt.NDArray[np.float32], pos: int) -> npt.NDArray[np.float32]: ...
    def clear(self) -> None: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def compute_buffer_bytes(self) -> int: ...
    @property
    def n_graph_reuse(self) -> int:
        """How often a decode reused the graph before it."""
    @property
    def last_nodes(self) -> list[tuple[str, str, str]]:
        """(op, name, name of the first source) of every node computed in the last decode; needs `trace`."""

def tokenize(engine: LoadedModel, text: bytes, add_special: bool, parse_special: bool) -> list[int]: ...
def detokenize(engine: LoadedModel, tokens: list[int], remove_special: bool, unparse_special: bool) -> bytes: ...
def metadata(engine: LoadedModel, key: str) -> str | None: ...
def model_info(engine: LoadedModel) -> dict[str, Any]: ...
def gguf_read(path: str) -> dict[str, Any]:
    """version, metadata (arrays as their length), tensors as (name, shape, type, offset, bytes)."""

def log_set_level(level: int) -> None: ...
def log_drain() -> tuple[list[tuple[int, int, str]], int]: ...
def supports_gpu_offload() -> bool: ...
def quant_types() -> list[tuple[str, int, int, int, bool, bool]]:
    """Types that store weights: (name, id, block size, block bytes, is quantized, encoder demands importance data)."""

def quantize(
    type: int,
    source_type: int,
    data: npt.NDArray[np.uint8],
    n_cols: int,
    importance: npt.NDArray[np.float32] | None,
    first_row: int,
) -> npt.NDArray[np.uint8]:
    """Raises ValueError. Shapes: (n_rows, row bytes of source_type) uint8 -> (n_rows, row bytes of type)."""

def dequantize(type: int, data: npt.NDArray[np.uint8], n_cols: int) -> npt.NDArray[np.float32]: ...
def validate(type: int, data: npt.NDArray[np.uint8]) -> bool: ...
def tensor_data(engine: LoadedModel, name: str) -> npt.NDArray[np.uint8]:
    """A tensor of the loaded model, in its own type. Raises ValueError when it is mapped or repacked."""

def set_tensor_data(engine: LoadedModel, name: str, data: npt.NDArray[np.uint8]) -> None: ...

RPC_VERSION: tuple[int, int, int]

def rpc_add_server(endpoint: str) -> list[str]:
    """Names of the worker's devices, now known to this process. Raises: RuntimeError when it is not there."""

def gpu_devices(rpc: bool) -> list[str]:
    """Names of this machine's GPUs, or of the devices of the workers known so far."""

class ImatrixSession:
    """A context on an engine's weights that sums the squared inputs of every weight matrix, and what experts add."""

    def __init__(
        self, engine: LoadedModel, n_ctx: int, n_batch: int, n_threads: int, process_output: bool, experts: bool
    ) -> None: ...
    def close(self) -> None: ...
    def load_projector(self, path: str, marker: str, n_threads: int, use_gpu: bool) -> None: ...
    def add_tokens(self, tokens: npt.NDArray[np.int32]) -> None: ...
    def add_prompt(self, prompt: str, pictures: list[npt.NDArray[np.uint8]]) -> int: ...
    def statistics(self) -> list[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.int64]]]: ...
    def expert_statistics(self) -> dict[str, dict[str, npt.NDArray[np.float64]]]: ...
