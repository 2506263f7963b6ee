#pragma once

// What AVX2 and AVX-512 share: the numbers of eight rows side by side. Before it is included: ccq_lanes, the register
// that collects a block; ccq_dot_block, which fills it; ccq_sums, the sums of eight of them.

static inline void ccq_dot_group(const ccq_tables * tables, int n, float * s, const uint8_t * x, size_t row_bytes,
    int n_rows, const ccq_q8_k * y, const int e_bits) {
    const size_t    size = 66 + 8 * (size_t) e_bits;
    const uint8_t * row[N_GROUP];  // those that are not there repeat the last one
    for (int r = 0; r < N_GROUP; r++) {
        row[r] = x + (r < n_rows ? r : n_rows - 1) * row_bytes;
    }
    const char * next =
        (const char *) x + N_GROUP * row_bytes;  // what follows; the processor sees too many streams to guess it
    // a level fills both words of its lane; an index has bits of the next planes above its own two
    const __m256i levels =
        _mm256_mullo_epi32(_mm256_setr_epi32(13, 15, 17, 21, 13, 15, 17, 21), _mm256_set1_epi32(0x10001));
    __m256 sum = _mm256_setzero_ps();
    for (int i = 0; i < n / QK_CCQ; i++) {
        uint64_t head[2] = { 0, 0 };  // the first two bytes of every block
        for (int r = 0; r < N_GROUP; r++) {
            uint16_t two;
            memcpy(&two, row[r] + i * size, sizeof(two));
            head[r / 4] |= (uint64_t) two << 16 * (r % 4);
        }
        const __m256i heads = _mm256_cvtepu16_epi32(_mm_set_epi64x((int64_t) head[1], (int64_t) head[0]));
        const __m256i pairs = _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *) y[i].bsums), _mm256_set1_epi16(1));
        const __m256i planes =
            _mm256_add_epi32(pairs, _mm256_shuffle_epi32(pairs, 0xB1));  // sums of the planes, each twice
        int32_t level[4 * N_GROUP] __attribute__((aligned(32)));
        __m256i extra = _mm256_setzero_si256();  // what comes of weights that are 64 too large
        for (int p = 0; p < 4; p++) {
            const __m256i l     = _mm256_permutevar8x32_epi32(levels, _mm256_srli_epi32(heads, 8 + 2 * p));
            const __m256i plane = _mm256_permutevar8x32_epi32(planes, _mm256_set1_epi32(2 * p));
            extra = _mm256_add_epi32(extra, _mm256_madd_epi16(l, _mm256_and_si256(plane, _mm256_set1_epi32(0xFFFF))));
            _mm256_store_si256((__m256i *) (level + N_GROUP * p), l);
        }
        ccq_lanes dot[N_GROUP];
        for (int r = 0; r < n_rows; r++) {
            _mm_prefetch(next, _MM_HINT_T0);
            next += size;
            dot[r] = ccq_dot_block(tables, row[r] + i * size, &y[i], level + r, e_bits);
        }
        for (int r = n_rows; r < N_GROUP; r++) {
            dot[r] = dot[0];
        }
        const __m256i total = _mm256_sub_epi32(ccq_sums(dot), _mm256_slli_epi32(extra, 6));
        const __m256i u     = _mm256_and_si256(heads, _mm256_set1_epi32(254));  // ccq_scale16
        const __m256i bits  = _mm256_add_epi32(_mm256_slli_epi32(u, 19), _mm256_set1_epi32(103 << 23));
        const __m256  scale =
            _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpeq_epi32(u, _mm256_setzero_si256()), bits));
        sum =
            _mm256_add_ps(sum, _mm256_mul_ps(_mm256_mul_ps(scale, _mm256_set1_ps(y[i].d)), _mm256_cvtepi32_ps(total)));
    }
    float sums[N_GROUP];
    _mm256_storeu_ps(sums, sum);
    memcpy(s, sums, n_rows * sizeof(float));
}

// what comes of levels that are 32 too large, over 32
static inline int32_t ccq2_b_extra(const ccq2_b_half * x, const ccq_q8_k * y) {
    int32_t extra = 0;
    for (int g = 0; g < 4; g++) {
        const int16_t * sums = y->bsums + 4 * g;
        extra += x->local[g] * (sums[0] + sums[1] + sums[2] + sums[3]);
    }
    return extra;
}
