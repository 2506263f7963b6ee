"""Is a 2-bit release read rightly? Its decoded weights are held against those of the release it was made from.

Norms, routers and embeddings, which both have in full, must be the same: they tell one training state from another.
Every expert is compared on a few thousand weights in the reading that was asked for, some on many more in every other
reading that is known; only a reading that fits, and fits clearly better than all others, is converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from pyllamaernie.convert.checkpoint import FLOAT_TYPES, StoredTensor
from pyllamaernie.convert.ernie4_5 import TextConfig, canonical_name
from pyllamaernie.convert.ernie4_5_moe import Bank, bank_rows
from pyllamaernie.convert.plan import Pool, Rows
from pyllamaernie.convert.wint2 import (
    DOCUMENTED,
    PROJECTIONS,
    READINGS,
    UP_GATE,
    Codes,
    Experts,
    TwoBitFolder,
    reading_name,
    split_reading,
)
from pyllamaernie.errors import ConvertError, WeightMismatchError

# Baidu's code leaves a correlation of 0.94 on Gaussian weights, of 0.91 on Laplace ones; with errors fed back between
# columns (tried on correlated inputs) 0.91 and 0.86. Read wrongly it is near 0, but for nibbles, which cost 0.01.
NEEDED = 0.7
CLEAR = 5.0  # standard errors between the wanted reading and any other
SIZES = (0.5, 1.5)  # decoded over original weights, by least squares
NOT_READINGS = REVERSED, OTHER_EXPERT = "reversed fields", "another expert"  # told, but not converted

_RUN = 16  # neighbouring channels, so that a sample is few pieces of a file
_LIGHT_COLS, _FULL_COLS = 512, 4096

_PLAIN = re.compile(
    r"^model\.(norm|embed_tokens|layers\.\d+\.(input_layernorm|post_attention_layernorm|mlp\.gate))\.weight$"
    r"|\.e_score_correction_bias$"
)
_PLAIN_ROWS = 64  # of the embedding
_SAME_SHARE = 0.99


@dataclass(frozen=True)
class CheckReport:
    """What was found. `readings`: projection -> reading -> mean correlation of the sampled experts' channels."""

    reading: str
    n_experts: int
    lowest: float
    median: float
    size: float  # decoded over original weights, median of all experts
    readings: dict[str, dict[str, float]] = field(default_factory=dict)
    n_plain: int = 0  # norms, routers and the embedding that were compared, and the share of equal values
    same: float = 1.0

    def lines(self) -> list[str]:
        """The report as text."""
        out = [
            f"read as {self.reading}: correlation with the original {self.median:.4f}, at least {self.lowest:.4f}, "
            f"size {self.size:.3f} ({self.n_experts} experts)"
        ]
        for projection, found in self.readings.items():
            others = ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name != self.reading)
            out.append(f"{projection}: {found[self.reading]:.4f}; other readings: {others}")
        out.append(
            f"norms, routers, embedding: {100 * self.same:.2f} % of the values are equal ({self.n_plain} tensors)"
        )
        return out


class Originals:
    """Expert weights of the release that the codes were made from."""

    def __init__(self, pool: Pool, c: TextConfig, bank: Bank) -> None:
        self._pool, self._c, self._bank = pool, c, bank
        self._layer = -1
        self._rows: dict[str, list[Rows | None]] = {}

    def rows(self, il: int, expert: int, projection: str, channels: slice) -> np.ndarray:
        """Shapes: -> (n, K) float32; channels of up_gate_proj count through gate and then up.

        Raises: ConvertError for a matrix that the original does not have.
        """
        if il != self._layer:
            self._layer, self._rows = il, bank_rows(self._pool, self._c, il, self._bank)
        n_ff, which, start, stop = self._bank.n_ff, "down", channels.start, channels.stop
        if projection == UP_GATE:
            which = "gate" if start < n_ff else "up"
            start, stop = start % n_ff, (stop - 1) % n_ff + 1
        rows = self._rows[which][expert]
        if rows is None:
            raise ConvertError(f"the original has no {which} matrix of expert {expert} in layer {il}")
        return np.concatenate(list(rows.part(start, stop).blocks(None)))


def check(
    experts: Experts,
    originals: Originals,
    plain: Mapping[str, StoredTensor],
    advance: Callable[[int], object] = lambda n: None,
) -> CheckReport:
    """Compares all experts, and what else both have; `advance` hears of each expert that is done.

    `plain`: the tensors of the original under their names in the file.
    Raises: WeightMismatchError naming the tensor, the correlations that were seen and what it takes; ConvertError for
    parameters that no encoder writes.
    """
    n_plain, same = compare_plain(experts.two_bit, plain)
    fits, sizes = [], []
    sampled = {(il, e) for il in _spread(experts.layers) for e in _spread(range(experts.n_expert))}
    channels: dict[str, dict[str, list[np.ndarray]]] = {p: {} for p in PROJECTIONS}
    first_name: dict[str, str] = {}
    for il in experts.layers:
        for e in range(experts.n_expert):
            for p in PROJECTIONS:
                pieces = experts.codes(il, e, p)
                for piece in pieces:
                    check_parameters(piece)
                fit, size = _light(experts, originals, il, e, p, pieces)
                if not fit >= NEEDED:
                    raise WeightMismatchError(_refusal(experts, originals, il, e, p, fit))
                if not SIZES[0] <= size <= SIZES[1]:
                    raise WeightMismatchError(
                        f"{pieces[0].name}: its weights are {size:.3g} times as large as the original's, expected "
                        f"{SIZES[0]} to {SIZES[1]}; do the super scales belong to it?"
                    )
                fits.append(fit)
                sizes.append(size)
                if (il, e) in sampled:
                    first_name.setdefault(p, pieces[0].name)
                    for name, values in _all_readings(experts, originals, il, e, p).items():
                        channels[p].setdefault(name, []).append(values)
            advance(1)
    seen = {p: {name: np.concatenate(parts) for name, parts in found.items()} for p, found in channels.items()}
    for p, found in seen.items():
        wanted = found[experts.reading]  # what comes to the same is no other reading: up-first, of down_proj
        seen[p] = {n: v for n, v in found.items() if n == experts.reading or not np.array_equal(v, wanted)}
        _must_be_best(first_name[p], experts.reading, seen[p])
    return CheckReport(
        experts.reading,
        len(experts.layers) * experts.n_expert,
        float(min(fits)),
        float(np.median(fits)),
        float(np.median(sizes)),
        {p: {name: float(np.mean(values)) for name, values in found.items()} for p, found in seen.items()},
        n_plain,
        same,
    )


def compare_plain(two_bit: TwoBitFolder, original: Mapping[str, StoredTensor]) -> tuple[int, float]:
    """How many tensors are stored in full on both sides, and the share of values that are equal as bfloat16.

    Raises: WeightMismatchError for a tensor of which less than 99 % is equal, or whose shape is another.
    """
    theirs = {canonical_name(name): tensor for name, tensor in original.items()}
    shares = []
    for name, tensor in sorted((two_bit.parts or ({},))[0].items()):
        key = canonical_name(name)
        other = theirs.get(key)
        if not _PLAIN.search(key) or other is None or {tensor.dtype, other.dtype} - set(FLOAT_TYPES):
            continue
        if tensor.shape != other.shape and (len(two_bit.part_folders) > 1 and "embed_tokens" in key):
            continue  # sliced by words
        if tensor.shape not in (other.shape, other.shape[::-1]):
            raise WeightMismatchError(
                f"{name}: has shape {list(tensor.shape)}, the original {list(other.shape)}; is it the same model?"
            )
        n_rows = min(tensor.n_rows, _PLAIN_ROWS) if "embed_tokens" in key else tensor.n_rows
        ours = _bfloat16(tensor.rows_f32(0, n_rows))
        expected = _bfloat16(other.rows_f32(0, n_rows if tensor.shape == other.shape else other.n_rows))
        shares.append(float((ours == (expected if tensor.shape == other.shape else expected.T)).mean()))
        if shares[-1] < _SAME_SHARE:
            raise WeightMismatchError(
                f"{name}: {100 * shares[-1]:.1f} % of its values are those of the original, at least "
                f"{100 * _SAME_SHARE:.0f} % are needed; is the original the release it was made from? Base and chat "
                "releases differ"
            )
    return len(shares), float(np.mean(shares)) if shares else 1.0


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def check_parameters(codes: Codes) -> None:
    """Raises ConvertError naming the first channel whose parameters cannot be meant so."""
    super_scale = (codes.super_bf16.astype(np.uint32) << 16).view(np.float32)
    for what, values, allowed in (
        ("code_scale", codes.code_scale, np.isfinite(codes.code_scale) & (codes.code_scale > 0)),
        ("code_zp", codes.code_zp, np.isfinite(codes.code_zp)),
        ("super scale", super_scale, np.isfinite(super_scale)),
    ):
        if not allowed.all():
            n = int(np.argmin(allowed))
            rule = "a positive number" if what == "code_scale" else "a finite number"
            raise ConvertError(f"{codes.name}: {what} of channel {n} is {values[n]}, expected {rule}")
    scale, zero = codes.code_scale.astype(np.float64), codes.code_zp.astype(np.float64) + 0.5
    if zero.min() >= 0 and (255 * scale + zero).max() < 32768:
        return
    words = np.floor(np.stack([codes.q.min(0) * scale, codes.q.max(0) * scale]) + zero)  # of codes that occur
    odd = ((words < 0) | (words > 32767)).any(0)
    if odd.any():
        n = int(np.argmax(odd))
        raise ConvertError(
            f"{codes.name}: channel {n} has words from {words[0, n]:.0f} to {words[1, n]:.0f}, expected 0 to 32767"
        )


def _spread(items: Sequence[int], n: int = 3) -> list[int]:
    items = list(items)
    return sorted({items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)})


def sample_runs(n_channels: int, n_runs: int, seed: Sequence[int]) -> list[slice]:
    """Runs of channels, one somewhere in each equal part of all, which is never in two halves."""
    part = n_channels // n_runs
    starts = np.random.default_rng(list(seed)).integers(0, max(1, part - _RUN + 1), n_runs)
    return [slice(i * part + int(at), i * part + int(at) + min(_RUN, part)) for i, at in enumerate(starts)]


def _weights(pieces: Sequence[Codes], runs: Sequence[slice], start: int, stop: int) -> np.ndarray:
    """Shapes: -> (channels of all runs, stop - start) float32."""
    columns, at = [], 0
    for piece in pieces:
        lo, hi = max(start - at, 0), min(stop - at, piece.n_cols)
        if lo < hi:
            columns.append(np.concatenate([piece.part(run, lo, hi).weights() for run in runs]))
        at += piece.n_cols
    return np.concatenate(columns, axis=1)


def _correlations(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Row by row; 1 where both are constant, 0 where one of them is."""
    ours, theirs = (x - x.mean(1, keepdims=True, dtype=np.float64) for x in (ours, theirs))
    both, a, b = (ours * theirs).sum(1), (ours * ours).sum(1), (theirs * theirs).sum(1)
    flat = (a == 0) | (b == 0)
    alike = ((a == 0) & (b == 0)).astype(float)
    return np.asarray(np.where(flat, alike, both / np.sqrt(np.where(flat, 1.0, a * b))))


def _light(
    experts: Experts, originals: Originals, il: int, e: int, p: str, pieces: Sequence[Codes]
) -> tuple[float, float]:
    """Correlation and size on 2 runs of channels and 512 columns."""
    n_cols = sum(piece.n_cols for piece in pieces)
    start = 128 * int(np.random.default_rng([il, e, 1]).integers(0, max(1, (n_cols - _LIGHT_COLS) // 128 + 1)))
    stop = min(start + _LIGHT_COLS, n_cols)
    runs = sample_runs(pieces[0].q.shape[1], 2, (il, e))
    ours = _weights(pieces, runs, start, stop)
    theirs = np.concatenate([originals.rows(il, e, p, run)[:, start:stop] for run in runs])
    energy = float((theirs.astype(np.float64) ** 2).sum())
    size = float((ours.astype(np.float64) * theirs).sum()) / energy if energy else 1.0
    return float(_correlations(ours, theirs).mean()), size


def _sample(experts: Experts, p: str) -> tuple[list[slice], int]:
    n_cols, n = experts.sizes[p]
    parts = len(experts.two_bit.part_folders)
    n_cols, n = (n_cols, n * parts) if p == UP_GATE else (n_cols * parts, n)
    return sample_runs(n, 4, (n_cols, n)), min(n_cols, _FULL_COLS)


def _all_readings(experts: Experts, originals: Originals, il: int, e: int, p: str) -> dict[str, np.ndarray]:
    """Correlations of the sampled channels in the wanted reading, and in every one that is one step from it."""
    runs, stop = _sample(experts, p)
    theirs = _original(originals, il, e, p, runs, stop)
    ours = _weights(experts.codes(il, e, p), runs, 0, stop)
    wanted = set(split_reading(experts.reading))
    found = {experts.reading: _correlations(ours, theirs)}
    for name in [reading_name(wanted ^ {step}) for step in READINGS] + [DOCUMENTED]:
        if name not in found:
            found[name] = _correlations(_weights(experts.codes(il, e, p, name), runs, 0, stop), theirs)
    found[REVERSED] = _correlations(_reversed(ours), theirs)
    others = [
        _correlations(ours, _original(originals, il, i, p, runs, stop)) for i in range(experts.n_expert) if i != e
    ]
    if others:
        found[OTHER_EXPERT] = max(others, key=np.mean)
    return found


def _original(originals: Originals, il: int, e: int, p: str, runs: Sequence[slice], stop: int) -> np.ndarray:
    return np.concatenate([originals.rows(il, e, p, run)[:, :stop] for run in runs])


def _reversed(weights: np.ndarray) -> np.ndarray:
    """The four weights of every code in reverse order."""
    return weights.reshape(len(weights), -1, 4)[:, :, ::-1].reshape(weights.shape)


def _must_be_best(name: str, reading: str, found: dict[str, np.ndarray]) -> None:
    wanted = found[reading]
    for other, values in found.items():
        gain = wanted - values
        if other == reading or gain.mean() > CLEAR * gain.std() / np.sqrt(len(gain)):
            continue
        if gain.mean() > 0:
            advice = "which is meant cannot be told"
        else:
            advice = "it is not converted" if other in NOT_READINGS else f"--reading {other} takes it so"
        raise WeightMismatchError(
            f"{name}: read as {reading}, its weights correlate with the original's by {wanted.mean():.4f}, but "
            f"{_told(other)} fits {'as well' if gain.mean() > 0 else 'better'}: {values.mean():.4f}; {advice}; "
            + _seen(found)
        )


def _told(name: str) -> str:
    if name in NOT_READINGS or name == DOCUMENTED:
        return "the documented reading" if name == DOCUMENTED else name
    return f"{name} ({'; '.join(READINGS[part][0] for part in name.split('+'))})"


def _seen(found: dict[str, np.ndarray]) -> str:
    return "seen: " + ", ".join(f"{name} {values.mean():.3f}" for name, values in found.items())


def _refusal(experts: Experts, originals: Originals, il: int, e: int, p: str, fit: float) -> str:
    """Why an expert is refused, and what is known to fit instead."""
    runs, stop = _sample(experts, p)
    theirs = _original(originals, il, e, p, runs, stop)
    found = {}
    for name in [reading_name(some) for n in range(3) for some in combinations(READINGS, n)]:
        found[name] = _correlations(_weights(experts.codes(il, e, p, name), runs, 0, stop), theirs)
    found.setdefault(experts.reading, _correlations(_weights(experts.codes(il, e, p), runs, 0, stop), theirs))
    singles = {name: values for name, values in found.items() if "+" not in name or name == experts.reading}
    singles[REVERSED] = _correlations(_reversed(_weights(experts.codes(il, e, p), runs, 0, stop)), theirs)
    name = experts.codes(il, e, p)[0].name
    text = (
        f"{name}: read as {experts.reading}, its weights correlate with the original's by {fit:.3f}; at least {NEEDED} "
        f"is needed (Baidu's code leaves about 0.94)"
    )
    best = max(found, key=lambda reading: found[reading].mean())
    if found[best].mean() >= NEEDED and best != experts.reading:
        advice = f"{_told(best)} fits with {found[best].mean():.3f}: --reading {best} takes it so"
    elif found[experts.reading].mean() >= NEEDED:
        advice = f"elsewhere they fit with {found[experts.reading].mean():.3f}: is the file damaged?"
    elif singles[REVERSED].mean() >= NEEDED:
        advice = "with the four weights of a code in reverse order it fits, which CCQ2_B cannot hold"
    else:
        advice = _other_place(experts, originals, il, e, p)
    return f"{text}; {advice}; {_seen(singles)}"


def _other_place(experts: Experts, originals: Originals, il: int, e: int, p: str) -> str:
    runs, stop = _sample(experts, p)
    ours = _weights(experts.codes(il, e, p), runs[:1], 0, stop)
    places = [(il, i) for i in range(experts.n_expert) if i != e] + [(i, e) for i in experts.layers if i != il]
    for layer, expert in places:
        if _correlations(ours, _original(originals, layer, expert, p, runs[:1], stop)).mean() >= NEEDED:
            return (
                f"it fits expert {expert} of layer {layer} of the original: the experts are in another order, which is "
                "not converted"
            )
    return "no known reading fits: is the original the model that it was made from?"
