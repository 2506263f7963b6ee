"""CCQ in numpy: the definition of the formats that every kernel is tested against. Slow, and meant to be read.

CCQ2, CCQ2_25, CCQ2_5 and CCQ2_75 are a convolutional code of our own: 64 bytes hold 256 weights, four of them hang on
every two neighbouring bytes. The bits of CCQ2_B, and how they decode, are Baidu's (arXiv 2507.07145; the decoding as
in PaddlePaddle/FastDeploy, wint2); only the block around them is ours. Encoding is no part of a format, but the C code
makes the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyllamaernie.gguf.types import QUANT_TYPES

N_STEPS = 64  # code bytes of a block; weight 64*p + b belongs to byte b and plane p
N_STATES = 256
LEVELS = np.array([13, 15, 17, 21], np.float32) / 16  # scales of a plane, beside the block's

# the search for a path: see encode()
N_SEAM = 24
ROW_BITS, COST_UNIT, COST_MAX, BASE_MAX = 11, 1024, (1 << 13) - 1, (1 << 15) - 1
BEAMS = {"CCQ2": 128, "CCQ2_25": 96, "CCQ2_5": 96, "CCQ2_75": 96}


@dataclass(frozen=True)
class Code:
    """What tells one native type from another: multipliers of four planes, level tables, refinement bits of a byte."""

    k: tuple[int, int, int, int]
    m: tuple[int, int, int, int]
    t1: tuple[tuple[int, ...], tuple[int, ...]]  # two tables; the second has the longer tails
    t2: tuple[tuple[int, ...], tuple[int, ...]]
    e_bits: int

    @property
    def levels(self) -> np.ndarray:
        """Level of every index: (2 tables, 256) int64."""
        h = np.arange(256)
        return np.asarray(np.array(self.t1)[:, h >> 4] + np.array(self.t2)[:, h & 15])

    @property
    def block_bytes(self) -> int:
        return 2 + N_STEPS + 8 * self.e_bits


CODES = {
    "CCQ2": Code(
        k=(41823, 13259, 44979, 46863),
        m=(0, 0, 0, 0),
        t1=(
            (-45, -29, -23, -17, -13, -9, -5, -2, 2, 5, 9, 12, 17, 23, 29, 45),
            (-50, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 51),
        ),
        t2=(
            (-5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5),
            (-5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5),
        ),
        e_bits=0,
    ),
    "CCQ2_25": Code(
        k=(5717, 5527, 39011, 50907),
        m=(57369, 30377, 16425, 64797),
        t1=(
            (-46, -29, -24, -17, -13, -9, -5, -2, 2, 5, 9, 13, 17, 23, 29, 45),
            (-52, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52),
        ),
        t2=(
            (-6, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 8),
            (-10, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 11),
        ),
        e_bits=1,
    ),
    "CCQ2_5": Code(
        k=(65071, 45485, 60343, 53725),
        m=(18957, 48343, 21225, 6591),
        t1=(
            (-46, -29, -23, -17, -12, -9, -5, -2, 2, 5, 9, 12, 17, 22, 29, 46),
            (-51, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52),
        ),
        t2=(
            (-7, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 7, 6),
            (-11, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 11, 6),
        ),
        e_bits=2,
    ),
    "CCQ2_75": Code(
        k=(18635, 50727, 32485, 38497),
        m=(111, 59539, 36897, 49105),
        t1=(
            (-46, -29, -23, -16, -12, -9, -4, -1, 1, 5, 9, 12, 17, 22, 30, 47),
            (-50, -23, -17, -9, -8, -6, -3, -1, 1, 4, 8, 9, 12, 17, 26, 52),
        ),
        t2=(
            (-11, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 9),
            (-12, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 11),
        ),
        e_bits=3,
    ),
}


def scales(d: np.ndarray) -> np.ndarray:
    """Scale by a block's first byte: bits 1..7 are u; 0 is zero, else 2^((u >> 3) - 20) * (1 + (u & 7)/8)."""
    u = np.asarray(d).astype(np.uint32) >> 1
    return np.where(u == 0, np.float32(0), ((u << 20) + np.uint32(107 << 23)).view(np.float32))


def split(blocks: np.ndarray, e_bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Takes blocks apart into scale, table, level indices of the planes, code bytes and refinement bits.

    Shapes: (n, block bytes) uint8 -> (n,) float32, (n,), (n, 4), (n, 64), (n, 64) int64.
    """
    blocks = blocks.astype(np.int64)
    level = (blocks[:, 1:2] >> np.array([0, 2, 4, 6])) & 3
    qs, rest = blocks[:, 2:66], blocks[:, 66:]
    e = np.zeros_like(qs)
    if e_bits >= 2:  # 16 bytes: byte j, bits 2i..2i+1 belong to step 16*i + j
        e = ((rest[:, None, :16] >> np.array([0, 2, 4, 6])[:, None]) & 3).reshape(-1, N_STEPS)
        rest = rest[:, 16:]
    if e_bits % 2:  # 8 bytes: byte j, bit i belongs to step 8*i + j
        e = e | ((rest[:, None, :8] >> np.arange(8)[:, None]) & 1).reshape(-1, N_STEPS) << (e_bits - 1)
    return scales(blocks[:, 0]), blocks[:, 0] & 1, level, qs, e


def join(d: np.ndarray, level: np.ndarray, qs: np.ndarray, e: np.ndarray, e_bits: int) -> np.ndarray:
    """The blocks that split() takes apart; `d` is the whole first byte."""
    parts = [d[:, None], (level << np.array([0, 2, 4, 6])).sum(1)[:, None], qs]
    if e_bits >= 2:
        parts.append(((e & 3).reshape(-1, 4, 16) << np.array([0, 2, 4, 6])[:, None]).sum(1))
    if e_bits % 2:
        parts.append(((e >> (e_bits - 1) & 1).reshape(-1, 8, 8) << np.arange(8)[:, None]).sum(1))
    return np.concatenate(parts, axis=1).astype(np.uint8)


def indices(qs: np.ndarray, e: np.ndarray, k: np.ndarray, m: np.ndarray) -> np.ndarray:
    """Index h of every weight: the high byte of window * K + e * M, modulo 2^16; the window is a byte and the next one.

    Shapes: (n, 64), (n, 64), (4,), (4,) -> (n, 4, 64).
    """
    window = qs | np.roll(qs, -1, axis=1) << 8
    word = window[:, None] * np.reshape(k, (4, 1)) + e[:, None] * np.reshape(m, (4, 1)) & 0xFFFF
    return np.asarray(word >> 8)


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """The weights of blocks of a native type.

    Shapes: (n, block bytes) uint8 -> (n, 256) float32.
    """
    code = _code(name, blocks)
    scale, table, level, qs, e = split(blocks, code.e_bits)
    y = code.levels[table[:, None, None], indices(qs, e, np.array(code.k), np.array(code.m))]
    return np.reshape(y.astype(np.float32) * (scale[:, None] * LEVELS[level])[:, :, None], (-1, 256))


def _code(name: str, blocks: np.ndarray) -> Code:
    if name not in CODES:
        raise ValueError(f"{name} is no native CCQ type; there are {', '.join(CODES)}")
    code = CODES[name]
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != code.block_bytes:
        raise ValueError(
            f"{name}: blocks are (n, {code.block_bytes}) of uint8, not {tuple(blocks.shape)} of {blocks.dtype}"
        )
    return code


def decode_ccq2_b(blocks: np.ndarray) -> np.ndarray:
    """The weights of CCQ2_B blocks, equal to baidu_weights() bit for bit.

    Shapes: (n, 142) uint8 -> (n, 512) float32.
    """
    size = QUANT_TYPES["CCQ2_B"].block_bytes
    if blocks.dtype != np.uint8 or blocks.ndim != 2 or blocks.shape[1] != size:
        raise ValueError(f"CCQ2_B: blocks are (n, {size}) of uint8, not {tuple(blocks.shape)} of {blocks.dtype}")
    blocks = np.ascontiguousarray(blocks)
    scale = blocks[:, 0:4].copy().view("<f4")[:, 0]
    zero = blocks[:, 4:8].copy().view("<f4")[:, 0]
    super_scale = bf16_to_float32(blocks[:, 8:10].copy().view("<u2")[:, 0])
    return baidu_weights(blocks[:, 14:].T, blocks[:, 10:14].T, scale, zero, super_scale).T


def encode_ccq2_b(
    q: np.ndarray, local: np.ndarray, code_scale: np.ndarray, code_zp: np.ndarray, super_bf16: np.ndarray
) -> np.ndarray:
    """Baidu's tensors of one expert's projection as rows of CCQ2_B blocks, nothing lost.

    Shapes: q (K/4, N) uint8, local (K/128, N) uint8, code_scale, code_zp (N,) float32, super_bf16 (N,) uint16 with the
    bits of bfloat16 -> (N, K/512 * 142) uint8.
    Raises: ValueError if K is no multiple of 512 or the shapes do not belong together.
    """
    n_cols, n_rows = 4 * q.shape[0], q.shape[1]
    if n_cols == 0 or n_cols % 512:
        raise ValueError(f"CCQ2_B: a row has {n_cols} weights; it must be a multiple of 512")
    expected: dict[str, tuple[int, ...]] = {"q": (n_cols // 4, n_rows), "local": (n_cols // 128, n_rows)}
    expected |= dict.fromkeys(("code_scale", "code_zp", "super_bf16"), (n_rows,))
    given = {"q": q, "local": local, "code_scale": code_scale, "code_zp": code_zp, "super_bf16": super_bf16}
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"CCQ2_B: {name} has the shape {given[name].shape}, expected {shape}")
    per_row = [
        np.ascontiguousarray(code_scale, "<f4").view(np.uint8).reshape(n_rows, 4),
        np.ascontiguousarray(code_zp, "<f4").view(np.uint8).reshape(n_rows, 4),
        np.ascontiguousarray(super_bf16, "<u2").view(np.uint8).reshape(n_rows, 2),
    ]
    head = np.repeat(np.concatenate(per_row, axis=1)[:, None], n_cols // 512, axis=1)  # (N, K/512, 10)
    ls, qs = (np.ascontiguousarray(a.T).reshape(n_rows, n_cols // 512, -1) for a in (local, q))
    return np.concatenate([head, ls, qs], axis=2).reshape(n_rows, -1)


def baidu_weights(
    q: np.ndarray, local: np.ndarray, code_scale: np.ndarray, code_zp: np.ndarray, super_scale: np.ndarray
) -> np.ndarray:
    """What the tensors of the released 2-bit checkpoint stand for, one expert's projection.

    A byte of q becomes a word of 15 bits by the affine map of its output channel; the four weights are the fields of
    6 bits at shifts 9, 6, 3 and 0, less 32, times a local scale of 4 bits (the even group in the high nibble) times
    the channel's super scale. The map is one fused multiply-add; rounding twice gives other words for some channels.

    Shapes: q (K/4, N) uint8, local (K/128, N) uint8, the others (N,) float32 -> (K, N) float32.
    """
    n_cols = 4 * q.shape[0]
    with np.errstate(invalid="ignore", over="ignore"):
        t = np.floor(_fused(q.astype(np.float32), code_scale, code_zp.astype(np.float32) + np.float32(0.5)))
        word = np.where(np.abs(t) < 2.0**30, t, 0).astype(np.int64)
        level = ((word[:, None] >> np.array([9, 6, 3, 0])[:, None]) & 63) - 32  # (K/4, 4, N)
        group = np.arange(n_cols) // 64
        nibble = (local[group // 2] >> np.where(group % 2, 0, 4)[:, None]) & 15
        scale = nibble.astype(np.float32) * super_scale.astype(np.float32)
        return np.asarray(level.reshape(n_cols, -1).astype(np.float32) * scale)


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Values of bfloat16 given by their bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32 with one rounding; `a` of at most 8 bits, so the product is exact in float64.

    The sum is rounded to odd in float64 first: then the rounding to float32 cannot be spoiled by the first one.
    """
    product, addend = a.astype(np.float64) * b, np.broadcast_to(c.astype(np.float64), np.shape(a * b))
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    even = total.view(np.int64) & 1 == 0
    nudged = np.nextafter(total, np.where(rest > 0, np.inf, -np.inf))
    return np.asarray(np.where((rest != 0) & np.isfinite(rest) & even, nudged, total).astype(np.float32))


def encode(name: str, x: np.ndarray, weights: np.ndarray | None = None, beam: int | None = None) -> np.ndarray:
    """Blocks of a native type with a small (weighted) squared error: the bytes that the C encoder makes.

    For both tables, searches that keep few states (a sixth of `beam`) climb from the scale that gives the block its
    energy to a better one; searches that keep `beam` climb on from the best path; the last ones, from the scales fitted
    to it, keep every state (half of them in CCQ2_75). Every search is the Viterbi algorithm on integers, so every
    machine finds the same path.

    Shapes: (n, 256) float32, weights (256,) or (n, 256) -> (n, block bytes) uint8.
    Raises: ValueError for another shape, for a name that is no native type and for a value that is not finite.
    """
    if name not in CODES:
        raise ValueError(f"{name} is no native CCQ type; there are {', '.join(CODES)}")
    if x.ndim != 2 or x.shape[1] != 256:
        raise ValueError(f"{name}: weights come as (n, 256), not {tuple(x.shape)}")
    bad = np.argwhere(~np.isfinite(x))
    if len(bad):
        raise ValueError(f"{name}: weight {bad[0][1]} of block {bad[0][0]} is {x[tuple(bad[0])]}; it must be finite")
    trellis = _Trellis(CODES[name])
    all_weights = np.broadcast_to(np.float32(1) if weights is None else weights, x.shape).astype(np.float32)
    paths = [
        _encode_block(trellis, _clean(block), _importances(w), beam or BEAMS[name])
        for block, w in zip(x.astype(np.float32), all_weights, strict=True)
    ]
    d, level, qs, e = (np.array([path[i] for path in paths]) for i in range(4))
    return join(d, level, qs, e, trellis.code.e_bits)


def nearest_scale(scale: float | np.float32) -> int:
    """Number u (1..127) of the scale nearest to a positive number, by the length of the step."""
    if not scale > 0:
        return 1
    bits = int(np.float32(scale).view(np.uint32))
    return min(127, max(1, (bits + (1 << 19) - (107 << 23)) >> 20))


# first byte, levels of the planes, code bytes and refinement bits of one block
_Path = tuple[int, np.ndarray, np.ndarray, np.ndarray]


class _Trellis:
    """Levels by transition. A transition is (row, new state); row = refinement bits * 256 + old state."""

    def __init__(self, code: Code) -> None:
        self.code = code
        row = np.arange(N_STATES << code.e_bits)
        window = (row & 255)[:, None] | np.arange(N_STATES) << 8  # (rows, 256)
        k, m = np.reshape(code.k, (4, 1, 1)), np.reshape(code.m, (4, 1, 1))
        self.index = (window * k + (row >> 8)[:, None] * m & 0xFFFF) >> 8  # (4, rows, 256)
        self.sigma = [float(np.float32(np.sqrt(float((y * y).sum()) / 256))) for y in code.levels]


def _clean(block: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(block, np.float32(-1e15), np.float32(1e15)))


def _importances(w: np.ndarray) -> np.ndarray:
    """Importances of a block, at most 1; what is not positive counts for nothing, and all of them for the same."""
    w = np.where(w > 0, np.minimum(w, np.finfo(np.float32).max), np.float32(0)).astype(np.float32)
    return np.asarray(w / w.max()) if w.max() > 0 else np.ones_like(w)


def _ordered_sum(values: np.ndarray) -> np.ndarray:
    """Sum over the last axis from the first to the last in float64, as C adds."""
    return np.asarray(np.add.accumulate(values.astype(np.float64), axis=-1)[..., -1])


def _encode_block(trellis: _Trellis, x: np.ndarray, w: np.ndarray, beam: int) -> _Path:
    """The best path that is found for a block; of a block of zeros for one that no path fits better."""
    nothing = np.zeros(N_STEPS, np.int64)
    best: _Path = (0, np.zeros(4, np.int64), nothing, nothing)
    best_error = 0.0  # errors are less that of a block of zeros
    energy = float(_ordered_sum((w.astype(np.float64) * x) * x))

    def attempt(d: int, level: np.ndarray, kept: int) -> float:
        nonlocal best, best_error
        qs, e = _search(trellis, d, level, x, w, kept)
        path, error = _refit(trellis, d, level, qs, e, x, w)
        if error < best_error:
            best, best_error = path, error
        return error

    def climb(d: int, level: np.ndarray, kept: int, low: float) -> int:
        """The best scale above one that left the error `low`, or else below, going on as long as that helps."""
        top = d >> 1
        for step in (1, -1):
            u = (d >> 1) + step
            while 1 <= u <= 127 and (error := attempt(2 * u + (d & 1), level, kept)) < low:
                low, top, u = error, u, u + step
            if top != d >> 1:
                break
        return top

    few, moved = max(4, beam // 6), 0
    for table in range(2):
        first, level = _first_scale(trellis, table, x, w)
        d = 2 * min(127, max(1, (first >> 1) + moved)) + table
        so_far = best_error
        error = attempt(d, level, few)
        if table == 1 and energy + error > 1.1 * (energy + so_far):
            break
        moved = climb(d, level, few, error) - (first >> 1)
    if best[0] >= 2:
        attempt(best[0], best[1], beam)
        climb(best[0], best[1], beam, best_error)
    for _ in range(3):
        before = best
        if before[0] >= 2:
            attempt(before[0], before[1], N_STATES if trellis.code.e_bits < 3 else N_STATES // 2)
        if best[0] == before[0] and (best[1] == before[1]).all():
            break
    return best


def _first_scale(trellis: _Trellis, table: int, x: np.ndarray, w: np.ndarray) -> tuple[int, np.ndarray]:
    """Scale and levels that give the planes of the block the energy they have."""
    w4, x4 = w.reshape(4, N_STEPS).astype(np.float64), x.reshape(4, N_STEPS).astype(np.float64)
    weight, energy = _ordered_sum(w4), _ordered_sum((w4 * x4) * x4)
    rms = np.sqrt(np.divide(energy, weight, out=np.zeros(4), where=weight > 0))
    sigma = trellis.sigma[table]
    d = 2 * nearest_scale(np.float32(np.sqrt(_ordered_sum(energy) / _ordered_sum(weight)) / sigma)) + table
    unit = float(scales(np.array([d]))[0]) * sigma
    return d, np.abs((rms / unit)[:, None] - LEVELS).argmin(1)


def _refit(
    trellis: _Trellis, d: int, level: np.ndarray, qs: np.ndarray, e: np.ndarray, x: np.ndarray, w: np.ndarray
) -> tuple[_Path, float]:
    """A path with the scale and levels that suit its codes best, and its error less that of a block of zeros."""
    code, table = trellis.code, d & 1
    h = indices(qs[None], e[None], np.array(code.k), np.array(code.m))[0]
    y = code.levels[table][h].astype(np.float64)  # (4, 64)
    wy = w.reshape(4, N_STEPS).astype(np.float64) * y
    xy, yy = _ordered_sum(wy * x.reshape(4, N_STEPS).astype(np.float64)), _ordered_sum(wy * y)
    now = LEVELS[level].astype(np.float64)
    fit, norm = _ordered_sum(xy * now), _ordered_sum(yy * (now * now))
    nearest = nearest_scale(np.float32(fit / norm) if norm > 0 else np.float32(0))
    best, best_error = (d, level, qs, e), 0.0
    for u in range(max(1, nearest - 3), min(127, nearest + 3) + 1):
        gain = (scales(np.array([2 * u])) * LEVELS).astype(np.float64)  # (4 levels,)
        error = (gain * yy[:, None] - 2 * xy[:, None]) * gain  # (4 planes, 4 levels)
        total = float(_ordered_sum(error.min(1)))
        if total < best_error:
            best, best_error = (2 * u + table, error.argmin(1), qs, e), total
    return best, best_error


def _search(
    trellis: _Trellis, d: int, level: np.ndarray, x: np.ndarray, w: np.ndarray, beam: int
) -> tuple[np.ndarray, np.ndarray]:
    """Code bytes and refinement bits of a path around the block: it ends in the byte with which it starts.

    That byte comes from a search of the 24 steps around the seam, the path from one of all 64 between it and itself.
    """
    gain = scales(np.array([d])) * LEVELS[level]  # (4,)
    weight = _ordered_sum(w.reshape(4, N_STEPS))
    sigma = trellis.sigma[d & 1]
    energy = _ordered_sum(weight * (gain.astype(np.float64) * gain.astype(np.float64)))
    unit = np.float32(COST_UNIT * 256 / (energy * (sigma * sigma)))
    v = gain[:, None] * trellis.code.levels[d & 1].astype(np.float32)  # (4, 256): by plane and index
    v, x4, w4 = v[:, None], x.reshape(4, N_STEPS, 1), w.reshape(4, N_STEPS, 1)
    cost = w4 * (v * (v - 2 * x4))  # (4, 64, 256)
    over = (cost - cost.min(2, keepdims=True)) * unit
    cost = np.where(over < COST_MAX, over, COST_MAX).astype(np.int64)
    qs, _ = viterbi(trellis.index, np.roll(cost, N_SEAM // 2, axis=1)[:, :N_SEAM], beam)
    return viterbi(trellis.index, cost, beam, int(qs[N_SEAM // 2]))


def viterbi(index: np.ndarray, cost: np.ndarray, beam: int, seam: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest path of bytes: the byte and the refinement bits of every step; of equals that with the lowest rows.

    With a `seam`, that state comes before the first and after the last step. Only the `beam` best states go on.

    Shapes: index (4, rows, 256), cost (4, n, 256) int64 by plane, step and index -> (n,), (n,) int64.
    """
    rows = np.arange(index.shape[1])
    old, n_steps = rows & 255, cost.shape[1]
    base = np.zeros(N_STATES, np.int64)
    chosen = np.empty((n_steps, N_STATES), np.int64)
    for i in range(n_steps):
        if i == 0:
            alive = old == seam if seam is not None else np.ones(len(rows), bool)
        else:
            alive = base[old] <= np.partition(base, beam - 1)[beam - 1]
        kept = rows[alive]
        total = np.repeat(base[kept & 255][:, None], N_STATES, axis=1)
        for p in range(4):
            total += cost[p, i][index[p] if alive.all() else index[p, kept]]
        word = (total << ROW_BITS | kept[:, None]).min(0)
        base = np.minimum((word >> ROW_BITS) - (word >> ROW_BITS).min(), BASE_MAX)
        chosen[i] = word & ((1 << ROW_BITS) - 1)
    state = int(base.argmin()) if seam is None else seam
    path = np.empty(n_steps, np.int64)
    for i in range(n_steps - 1, -1, -1):
        path[i] = chosen[i, state]
        state = path[i] & 255
    return path & 255, path >> 8
