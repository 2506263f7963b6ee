"""Tokens per second of CCQ types beside ggml's of the same size, at the shapes of ERNIE-4.5-21B-A3B.

    python bench/ccq_speed.py
    python bench/ccq_speed.py --types CCQ2 IQ2_XXS Q2_K --rounds 9
    python bench/ccq_speed.py --busy              where others take turns on the cores

Writes one GGUF per type with random blocks (the first layer dense, the rest MoE; embeddings, which are the output
matrix too, in Q6_K; routers in F32) and runs llama-bench of the installed package on them in turns, so that ratios
hold on a busy machine. The limit is what the read bandwidth of the machine, measured in the same rounds, allows for the
bytes that one token reads. All types with 8 layers need 17 GB of disk, and memory for two files; gcc for the bandwidth.

With --busy one thread works, and llama-bench is shown its processor time instead of the clock: tokens per second of a
core that nobody else uses, but for the caches and the memory.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import paths  # noqa: F401

import gguf
import numpy as np
from tqdm import tqdm
from turns import Figures, Rounds, medians, ratios, take_turns

from pyllamaernie import programs
from pyllamaernie.gguf.file import TensorType

N_VOCAB, N_EMBD, N_HEAD, N_HEAD_KV, N_FF = 103424, 2560, 20, 4, 12288
N_EXPERT, N_EXPERT_USED, N_FF_EXP, N_FF_SHARED = 64, 6, 1536, 3072
MEMORY = "memory"  # takes its turn like a type
TYPES = ("CCQ2", "CCQ2_25", "CCQ2_5", "CCQ2_75", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS")
BARS = (  # what, type, the type it is measured by, at least
    ("decode", "CCQ2", "IQ2_XXS", 1.6),
    ("decode", "CCQ2", "Q2_K", 1.0),
    ("prefill", "CCQ2", "IQ2_XS", 1.0),
)
# type -> (offset, float16) of the scales of a block, so that weights have a root mean square of about 0.02
SCALES = {
    "IQ2_XXS": ((0, 5e-4),),
    "IQ2_XS": ((0, 5e-4),),
    "IQ2_S": ((0, 5e-4),),
    "IQ3_XXS": ((0, 3e-4),),
    "Q2_K": ((80, 2e-3), (82, 2e-3)),
    "Q6_K": ((208, 1.5e-5),),
}
READ = r"""
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
typedef struct { const uint64_t * data; size_t n; uint64_t sum; } job;
static void * read_all(void * arg) {
    job * j = arg;
    uint64_t s[16] = { 0 };
    for (size_t i = 0; i < j->n; i += 16) {
        for (int k = 0; k < 16; k++) s[k] += j->data[i + k];
    }
    for (int k = 0; k < 16; k++) j->sum += s[k];
    return NULL;
}
double gigabytes_per_second(int n_threads, size_t n_bytes, int busy) {
    uint64_t * data = malloc(n_bytes);
    memset(data, 1, n_bytes);
    job jobs[64] = { 0 };
    pthread_t threads[64];
    struct timespec a, b;
    const clockid_t clock = busy ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC;
    clock_gettime(clock, &a);
    for (int t = 0; t < n_threads; t++) {
        const size_t n = n_bytes/8/n_threads/16*16;
        jobs[t] = (job) { data + t*n, n, 0 };
        pthread_create(&threads[t], NULL, read_all, &jobs[t]);
    }
    uint64_t sum = 0;
    for (int t = 0; t < n_threads; t++) {
        pthread_join(threads[t], NULL);
        sum += jobs[t].sum;
    }
    clock_gettime(clock, &b);
    free(data);
    return sum == 0 ? 0 : n_bytes/((b.tv_sec - a.tv_sec)*1e9 + (b.tv_nsec - a.tv_nsec));
}
"""

CLOCK = r"""
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec * t) {
    (void) id;
    return syscall(SYS_clock_gettime, CLOCK_PROCESS_CPUTIME_ID, t);
}
"""


def compile_c(source: str, library: Path) -> Path:
    """A shared library made of the source."""
    library.with_suffix(".c").write_text(source)
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", library, library.with_suffix(".c")], check=True)
    return library


def load_reader(folder: Path) -> ctypes.CDLL:
    """The bandwidth measurement, compiled."""
    reader = ctypes.CDLL(str(compile_c(READ, folder / "read.so")))
    reader.gigabytes_per_second.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    reader.gigabytes_per_second.restype = ctypes.c_double
    return reader


def random_blocks(kind: TensorType, n_blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes with sensible scales. Shapes: -> (n_blocks, bytes of a block) uint8."""
    blocks = rng.integers(0, 256, (n_blocks, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    for offset, scale in SCALES.get(kind.name, ()):
        blocks[:, offset : offset + 2] = np.array([scale], "<f2").view(np.uint8)
    if kind.name == "CCQ2_B":
        numbers = np.array([100, 16384 - 12750], "<f4").view(np.uint8)
        blocks[:, :10] = [*numbers, 0x1D, 0x39]  # super scale 1.5e-4
    elif kind.name.startswith("CCQ"):
        blocks[:, 0] = 160 | blocks[:, 0] & 1  # scale 2^-10
    return blocks


def tensors(kind: TensorType, n_layers: int) -> list[tuple[str, tuple[int, ...], TensorType]]:
    """Name, shape (rows before columns) and type of every tensor."""
    f32, matrix = TensorType.F32, kind
    rows = [("token_embd", (N_VOCAB, N_EMBD), TensorType.Q6_K), ("output_norm", (N_EMBD,), f32)]
    for i in range(n_layers):
        rows += [(f"blk.{i}.{name}", (N_EMBD,), f32) for name in ("attn_norm", "ffn_norm")]
        rows += [(f"blk.{i}.attn_{name}", (N_EMBD, N_EMBD), matrix) for name in ("q", "output")]
        rows += [(f"blk.{i}.attn_{name}", (128 * N_HEAD_KV, N_EMBD), matrix) for name in ("k", "v")]
        feed_forwards = [("", (), N_FF)] if i == 0 else [("_exps", (N_EXPERT,), N_FF_EXP), ("_shexp", (), N_FF_SHARED)]
        for suffix, experts, width in feed_forwards:
            rows += [(f"blk.{i}.ffn_{name}{suffix}", (*experts, width, N_EMBD), matrix) for name in ("gate", "up")]
            rows += [(f"blk.{i}.ffn_down{suffix}", (*experts, N_EMBD, width), matrix)]
        if i > 0:
            rows += [(f"blk.{i}.ffn_gate_inp", (N_EXPERT, N_EMBD), f32)]
    return rows


def n_bytes(shape: tuple[int, ...], kind: TensorType) -> int:
    """Size of a tensor."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * block_bytes


def n_bytes_read(kind: TensorType, n_layers: int) -> int:
    """What one token of decode reads of the weights."""
    part = {True: N_EXPERT_USED / N_EXPERT, False: 1}
    return int(sum(n_bytes(shape, t) * part["_exps" in name] for name, shape, t in tensors(kind, n_layers)))


def write_model(path: Path, kind: TensorType, n_layers: int) -> None:
    """Writes a model whose matrices are of that type."""
    writer = gguf.GGUFWriter(path, "ernie4_5-moe")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(N_VOCAB)
    writer.add_block_count(n_layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(128)
    writer.add_key_length(128)
    writer.add_value_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_EXPERT_USED)
    writer.add_expert_feed_forward_length(N_FF_EXP)
    writer.add_expert_shared_feed_forward_length(N_FF_SHARED)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(1)
    rng = np.random.default_rng(0)
    rows = tensors(kind, n_layers)
    for name, shape, type_ in rows:
        quantized = type_ != TensorType.F32
        byte_shape = (*shape[:-1], n_bytes(shape[-1:], type_)) if quantized else shape
        dtype = np.dtype(np.uint8 if quantized else np.float32)
        raw = type_ if quantized else None
        writer.add_tensor_info(f"{name}.weight", byte_shape, dtype, n_bytes(shape, type_), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools = {type_: random_blocks(type_, 40009, rng) for type_ in (kind, TensorType.Q6_K)}
    for _, shape, type_ in rows:
        if type_ == TensorType.F32:
            data = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.02
        else:  # repeats its bytes, but every one has its own place in memory
            n_blocks = int(np.prod(shape)) // gguf.GGML_QUANT_SIZES[type_][0]
            data = np.resize(pools[type_], (n_blocks, pools[type_].shape[1]))
        writer.write_tensor_data(data)
    writer.close()


def llama_bench(
    model: Path, n_threads: int, n_prompt: int, n_tokens: int, *words: str, clock: Path | None = None
) -> dict[str, float]:
    """Tokens per second of one run of llama-bench; what is asked with 0 tokens is left out."""
    command = [str(programs.path("llama-bench")), "-m", str(model), "-o", "jsonl", "-r", "1", "-t", str(n_threads)]
    command += ["-p", str(n_prompt), "-n", str(n_tokens), *words]
    environment = None if clock is None else {**os.environ, "LD_PRELOAD": str(clock)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in rows}


def write_models(folder: Path, types: Iterable[str], n_layer: int) -> dict[str, Path]:
    """A model per type in the folder; those that are there are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    models = {name: folder / f"{name}-{n_layer}.gguf" for name in types}
    for name, path in tqdm(models.items(), desc="writing models"):
        if not path.exists():
            partial = path.with_suffix(".part")
            write_model(partial, TensorType[name], n_layer)
            partial.rename(path)
    return models


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--types", nargs="+", default=TYPES, help=f"default: {' '.join(TYPES)}; CCQ2_B works too")
    parser.add_argument("--layers", type=int, default=8, help="the first is dense (default: 8)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every type; medians are shown (default: 5)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt (default: 256)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens that are decoded (default: 24)")
    parser.add_argument("--busy", action="store_true", help="processor time of one thread, not the clock")
    parser.add_argument("--folder", type=Path, help="keeps the models here, and uses those that are there")
    parser.add_argument("--bench", nargs=argparse.REMAINDER, default=[], help="the rest goes to llama-bench")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        reader = load_reader(Path(temporary))
        models = write_models(args.folder or Path(temporary), args.types, args.layers)
        clock = compile_c(CLOCK, Path(temporary) / "clock.so") if args.busy else None
        n_threads = 1 if args.busy else args.threads
        works: dict[str, Callable[[], Figures]] = {
            MEMORY: lambda: {MEMORY: reader.gigabytes_per_second(n_threads, 1 << 29, args.busy)}
        }
        for name, path in models.items():
            works[name] = functools.partial(
                llama_bench, path, n_threads, args.prompt, args.tokens, *args.bench, clock=clock
            )
        speeds = take_turns(works, args.rounds, progress=True)
    bandwidths = speeds.pop(MEMORY)[MEMORY]
    n_read = {name: n_bytes_read(TensorType[name], args.layers) for name in args.types}
    report(speeds, n_read, statistics.median(bandwidths))
    return 0


def report(speeds: Rounds, n_read: dict[str, int], bandwidth: float) -> None:
    """Prints the table of medians and the bars."""
    shown_of = medians(speeds)
    print(f"read bandwidth {bandwidth:.1f} GB/s")
    print("| type | prefill | decode | limit of decode | of the limit |\n|---|---|---|---|---|")
    for name, median in shown_of.items():
        limit = bandwidth * 1e9 / n_read[name]
        shown = [f"{median[what]:.1f}" if what in median else "-" for what in ("prefill", "decode")]
        share = f"{median['decode'] / limit:.0%}" if "decode" in median else "-"
        print(f"| {name} | {shown[0]} | {shown[1]} | {limit:.1f} | {share} |")
    for what, ours, other, bar in BARS:
        if what in speeds.get(ours, ()) and what in speeds.get(other, ()):
            of_rounds = ratios(speeds, what, ours, other)
            ratio = statistics.median(of_rounds)
            shown = f"{ratio:.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})"
            verdict = "met" if ratio >= bar else "MISSED"
            print(f"{what}: {ours} over {other}: {shown}, bar {bar}: {verdict}")


if __name__ == "__main__":
    raise SystemExit(main())
