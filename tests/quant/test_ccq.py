"""CCQ as numpy defines it: known bytes, an independent decoder, and what an optimal encoder cannot do."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

import numpy as np
import pytest

from pyllamaernie.quant import ccq

NATIVE = tuple(ccq.CODES)
# Files hold what these constants encoded: they never change again, not even to better ones.
FROZEN = {
    "CCQ2": "f7ca831bc2bd39e908888dfa79c1e5d3e9f51b66c4ac555a6f13c4682e20f214",
    "CCQ2_25": "8d0657a275fcd96ad4f362c217d55e7c69c4e40170c0152340a252bd10811b99",
    "CCQ2_5": "839971f7c4467bece67aa1087750175a8a336d577cf1c45272b126e1cd2ad9a4",
    "CCQ2_75": "4148698e1d4a2c1c137e736546200561ada7632afe7c4368824592e93d562223",
}


def random_blocks(name: str, n: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, ccq.CODES[name].block_bytes), np.uint8)


def gauss(n: int, seed: int = 2) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((n, 256)) * 0.02).astype(np.float32)


def decoded_by_hand(name: str, block: bytes) -> list[float]:
    """The same format once more, weight by weight, in Python's integers and floats."""
    code, u = ccq.CODES[name], block[0] >> 1
    scale = 0.0 if u == 0 else math.ldexp(8 + u % 8, u // 8 - 23)
    qs, rest = block[2:66], block[66:]
    weights = [0.0] * 256
    for b in range(64):
        e = 0
        if code.e_bits >= 2:
            e = rest[b % 16] >> 2 * (b // 16) & 3
        if code.e_bits in (1, 3):
            e += (rest[-8 + b % 8] >> b // 8 & 1) * (4 if code.e_bits == 3 else 1)
        window = qs[b] + 256 * qs[(b + 1) % 64]
        for p in range(4):
            h = (window * code.k[p] + e * code.m[p]) % 65536 // 256
            level = code.t1[block[0] % 2][h // 16] + code.t2[block[0] % 2][h % 16]
            weights[64 * p + b] = level * scale * (13, 15, 17, 21)[block[1] >> 2 * p & 3] / 16
    return weights


@pytest.mark.parametrize("name", NATIVE)
def test_decode_matches_a_decoder_written_weight_by_weight(name):
    blocks = random_blocks(name, 20)
    blocks[0, 0], blocks[1, 0], blocks[2, 0] = 0, 1, 255
    assert ccq.decode(name, blocks).tolist() == [decoded_by_hand(name, bytes(block)) for block in blocks]


def test_known_bytes_of_docs_ccq():
    block = np.zeros((1, 66), np.uint8)
    block[0, :2] = 240, 0xE4  # table 0, scale 1/32; levels 0, 1, 2, 3
    planes = ccq.decode("CCQ2", block).reshape(4, 64)
    assert planes.tolist() == [[v] * 64 for v in (-1.26953125, -1.46484375, -1.66015625, -2.05078125)]
    block[0, 3] = 1  # step 0 sees the window 256, step 1 the window 1; K[0] = 41823 = 0xA35F
    planes = ccq.decode("CCQ2", block).reshape(4, 64)
    assert planes[0, 0] == (-9 + 5) / 32 * 13 / 16  # h = 0x5F
    assert planes[0, 1] == (9 - 5) / 32 * 13 / 16  # h = 0xA3
    assert (planes[0, 2:] == -1.26953125).all()


@pytest.mark.parametrize("name", NATIVE)
def test_tables_are_frozen(name):
    code = ccq.CODES[name]
    windows = np.arange(65536)
    every = [
        code.levels[:, (windows * k + e * m & 0xFFFF) >> 8].astype(np.int8)
        for e in range(1 << code.e_bits)
        for k, m in zip(code.k, code.m, strict=True)
    ]
    everything = np.array(every).tobytes() + ccq.LEVELS.tobytes() + ccq.scales(np.arange(256)).tobytes()
    assert hashlib.sha256(everything).hexdigest() == FROZEN[name]


@pytest.mark.parametrize("name", NATIVE)
def test_multipliers_are_odd_and_levels_fit_the_products_of_eight_bits(name):
    code = ccq.CODES[name]
    assert all(k % 2 == 1 and 0 < k < 65536 for k in code.k)
    assert np.abs(code.levels).max() <= 63


def test_scale_bytes_are_what_they_say():
    d = np.array([0, 1, 2, 3, 16, 240, 254, 255])
    expected = [0, 0, 2**-20 * 1.125, 2**-20 * 1.125, 2**-19, 2**-5, 2**-5 * 1.75 + 0, 2**-5 * 1.75 + 0]
    expected[6] = expected[7] = 2**-5 * 1.875
    assert ccq.scales(d).tolist() == expected


def test_nearest_scale_finds_every_scale_and_rounds_in_the_middle():
    steps = np.arange(1, 128)
    values = ccq.scales(2 * steps)
    assert [ccq.nearest_scale(v) for v in values] == steps.tolist()
    middle = (values[:-1] + values[1:]) / 2
    assert [ccq.nearest_scale(v) for v in middle] == steps[1:].tolist()
    assert [ccq.nearest_scale(np.nextafter(v, np.float32(0))) for v in middle] == steps[:-1].tolist()
    assert [ccq.nearest_scale(v) for v in (0.0, -1.0, math.nan, 1e-30, 1e30, math.inf)] == [1, 1, 1, 1, 127, 127]


def test_refinement_bits_lie_where_the_layout_says():
    block = np.zeros((1, 90), np.uint8)
    block[0, 66 + 5] = 0b11100100  # byte 5 of e2: steps 5, 21, 37, 53
    block[0, 82 + 3] = 0b10000010  # byte 3 of e1: steps 11 and 59
    e = ccq.split(block, 3)[4][0]
    assert {b: int(v) for b, v in enumerate(e) if v} == {21: 1, 37: 2, 53: 3, 11: 4, 59: 4}
    block = np.zeros((1, 74), np.uint8)
    block[0, 66 + 7] = 0b00000101
    assert np.flatnonzero(ccq.split(block, 1)[4][0]).tolist() == [7, 23]


@pytest.mark.parametrize("name", NATIVE)
def test_split_and_join_are_inverse(name):
    blocks, e_bits = random_blocks(name, 50), ccq.CODES[name].e_bits
    _, _, level, qs, e = ccq.split(blocks, e_bits)
    assert (ccq.join(blocks[:, 0].astype(np.int64), level, qs, e, e_bits) == blocks).all()
    assert e.max() == (1 << e_bits) - 1


def test_viterbi_finds_the_cheapest_of_all_paths():
    trellis = ccq._Trellis(ccq.CODES["CCQ2_25"])
    cost = np.random.default_rng(5).integers(0, 5000, (4, 2, 256))
    qs, e = ccq.viterbi(trellis.index, cost, 256, seam=77)
    assert qs[0] == 77
    middle, first, second = np.meshgrid(np.arange(256), [0, 1], [0, 1], indexing="ij")
    steps = [
        sum(cost[p, 0][trellis.index[p, first << 8 | 77, middle]] for p in range(4)),
        sum(cost[p, 1][trellis.index[p, second << 8 | middle, 77]] for p in range(4)),
    ]
    total = steps[0] + steps[1]
    assert total[qs[1], e[0], e[1]] == total.min()


@pytest.mark.parametrize("name", [*NATIVE[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NATIVE[2:])])
def test_no_other_byte_would_lower_the_error(name):
    x, blocks = gauss(1), ccq.encode(name, gauss(1))
    code = ccq.CODES[name]
    scale, table, level, qs, e = ccq.split(blocks, code.e_bits)
    gain = (scale[:, None] * ccq.LEVELS[level])[0][:, None].astype(np.float64)

    def errors(rows: np.ndarray) -> np.ndarray:
        h = ccq.indices(rows, np.repeat(e, len(rows), 0), np.array(code.k), np.array(code.m))
        return ((code.levels[table[0]][h] * gain - x.reshape(4, 64)) ** 2).sum((1, 2))

    own = errors(qs)[0]
    slack = 8 * (x.astype(np.float64) ** 2).mean() / ccq.COST_UNIT  # costs are truncated to integers
    for b in range(1, 64):
        others = np.repeat(qs, 256, 0)
        others[:, b] = np.arange(256)
        assert errors(others).min() >= own - slack


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("CCQ2", 0.0745),
        ("CCQ2_25", 0.0545),
        pytest.param("CCQ2_5", 0.0395, marks=pytest.mark.slow),
        pytest.param("CCQ2_75", 0.0295, marks=pytest.mark.slow),
    ],
)
def test_gaussian_error_is_near_the_measured_one(name, most):
    x = gauss(3)
    y = ccq.decode(name, ccq.encode(name, x, beam=12))
    assert ((x - y) ** 2).sum() / (x**2).sum() < most  # 768 weights: several percent of sampling error


def test_importances_move_the_error_to_what_counts_less():
    x = gauss(4)
    w = np.exp(np.random.default_rng(4).standard_normal((4, 256))).astype(np.float32)
    with_w, without = (ccq.decode("CCQ2", ccq.encode("CCQ2", x, weights, beam=16)) for weights in (w, None))
    assert (w * (x - with_w) ** 2).sum() < 0.8 * (w * (x - without) ** 2).sum()


def test_a_block_of_zeros_is_zero_bytes():
    for name in NATIVE:
        assert not ccq.encode(name, np.zeros((1, 256), np.float32)).any()


def test_heavy_tails_choose_the_second_table():
    x = (np.random.default_rng(6).standard_t(3, (6, 256)) * 0.02).astype(np.float32)
    tables = ccq.split(ccq.encode("CCQ2", x, beam=8), 0)[1]
    assert tables.mean() > 0.7


def test_errors_name_what_was_wrong():
    with pytest.raises(ValueError, match=r"CCQ9 is no native CCQ type; there are CCQ2, CCQ2_25, CCQ2_5, CCQ2_75"):
        ccq.encode("CCQ9", gauss(1))
    with pytest.raises(ValueError, match=r"CCQ2: blocks are \(n, 66\) of uint8, not \(3, 74\) of uint8"):
        ccq.decode("CCQ2", np.zeros((3, 74), np.uint8))
    with pytest.raises(ValueError, match=r"weights come as \(n, 256\), not \(2, 128\)"):
        ccq.encode("CCQ2", np.zeros((2, 128), np.float32))
    bad = gauss(2)
    bad[1, 9] = np.nan
    with pytest.raises(ValueError, match="weight 9 of block 1 is nan"):
        ccq.encode("CCQ2", bad)


# Baidu's format


def baidu_tensors(n_cols: int, n_rows: int, seed: int = 3):
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 256, (n_cols // 4, n_rows), np.uint8)
    local = rng.integers(0, 256, (n_cols // 128, n_rows), np.uint8)
    scale = rng.uniform(85, 125, n_rows).astype(np.float32)
    zero = (16384 - 127.5 * scale).astype(np.float32)
    super_bf16 = (rng.uniform(0.001, 0.01, n_rows).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return q, local, scale, zero, super_bf16


def test_ccq2_b_known_bytes():
    block = np.zeros((1, 142), np.uint8)
    block[0, :4] = list(np.float32(128).tobytes())  # v = 128 * q
    block[0, 8:10] = [0x00, 0x3F]  # 0.5 in bfloat16
    block[0, 10] = 0x35  # group 0: 3, group 1: 5
    block[0, 14] = 1  # v = 128 = 0b000000010000000: fields 0, 2, 16, 0
    block[0, 14 + 16] = 255  # v = 32640 = 0b111111110000000: fields 63, 62, 48, 0
    y = ccq.decode_ccq2_b(block)[0]
    assert y[:4].tolist() == [-32 * 1.5, -30 * 1.5, -16 * 1.5, -32 * 1.5]
    assert y[64:68].tolist() == [31 * 2.5, 30 * 2.5, 16 * 2.5, -32 * 2.5]
    assert (y[4:64] == -48).all() and (y[128:] == 0).all()


def test_ccq2_b_blocks_stand_for_the_checkpoints_weights_bit_for_bit():
    q, local, scale, zero, super_bf16 = baidu_tensors(1024, 48)
    rows = ccq.encode_ccq2_b(q, local, scale, zero, super_bf16)
    assert rows.shape == (48, 2 * 142)
    expected = ccq.baidu_weights(q, local, scale, zero, ccq.bf16_to_float32(super_bf16))
    decoded = ccq.decode_ccq2_b(rows.reshape(-1, 142)).reshape(48, 1024)
    assert (decoded.T.view(np.uint32) == expected.view(np.uint32)).all()


def test_the_affine_map_is_rounded_once():
    rng = np.random.default_rng(8)
    n = 400
    a = rng.integers(0, 256, n).astype(np.float32)
    b = (rng.uniform(-1, 1, n) * 2.0 ** rng.integers(-40, 41, n)).astype(np.float32)
    c = (rng.uniform(-1, 1, n) * 2.0 ** rng.integers(-40, 41, n)).astype(np.float32)
    got = ccq._fused(a, b, c)
    twice = (a * b + c).astype(np.float32)
    assert (got != twice).any()
    for i in range(n):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        near = [np.nextafter(got[i], np.float32(s)) for s in (-np.inf, np.inf)]
        off = abs(Fraction(float(got[i])) - exact)
        assert all(off <= abs(Fraction(float(v)) - exact) for v in near)


def test_ccq2_b_refuses_what_does_not_belong_together():
    q, local, scale, zero, super_bf16 = baidu_tensors(512, 4)
    with pytest.raises(ValueError, match=r"local has the shape \(3, 4\), expected \(4, 4\)"):
        ccq.encode_ccq2_b(q, local[:3], scale, zero, super_bf16)
    with pytest.raises(ValueError, match="a row has 508 weights; it must be a multiple of 512"):
        ccq.encode_ccq2_b(q[:127], local, scale, zero, super_bf16)
    with pytest.raises(ValueError, match=r"CCQ2_B: blocks are \(n, 142\)"):
        ccq.decode_ccq2_b(np.zeros((1, 141), np.uint8))
