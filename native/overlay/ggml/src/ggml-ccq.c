// CCQ in C: decoding, and encoding by the Viterbi algorithm. Same arithmetic, in the same order, as
// pyllamaernie/quant/ccq.py, so the bytes are equal; build with -ffp-contract=off.

#include "ggml-ccq.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#ifndef CCQ_CLONES
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// jamming two rows into one pass over the states leaves GCC 12 with scalar code, 6 times slower
#define CCQ_CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"), optimize("no-loop-unroll-and-jam")))
#else
#define CCQ_CLONES
#endif
#endif

#define N_STEPS  64
#define N_STATES 256
#ifndef CCQ_E_BITS_MAX // bench/ccq_trials.py wants one more
#define CCQ_E_BITS_MAX 3
#endif
#define N_SEAM   24 // steps of the window from which the byte at the seam is read

#ifdef CCQ_EXACT // what bench/ccq_encoder.py compares with: no search leaves a state out
#define BEAM(n) (n > 0 ? N_STATES : 0)
#else
#define BEAM(n) (n)
#endif

const ggml_ccq_code ggml_ccq_codes[4] = {
    {
        { 41823, 13259, 44979, 46863 }, { 0, 0, 0, 0 },
        { { -45, -29, -23, -17, -13, -9, -5, -2, 2, 5, 9, 12, 17, 23, 29, 45 },
          { -50, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 51 } },
        { { -5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5 },
          { -5, -5, -5, -5, -1, -1, -1, -1, 1, 1, 1, 1, 5, 5, 5, 5 } }, 0,
    }, {
        { 5717, 5527, 39011, 50907 }, { 57369, 30377, 16425, 64797 },
        { { -46, -29, -24, -17, -13, -9, -5, -2, 2, 5, 9, 13, 17, 23, 29, 45 },
          { -52, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52 } },
        { { -6, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 8 },
          { -10, -4, -4, -3, -3, -2, -2, -1, 0, 1, 2, 2, 4, 4, 4, 11 } }, 1,
    }, {
        { 65071, 45485, 60343, 53725 }, { 18957, 48343, 21225, 6591 },
        { { -46, -29, -23, -17, -12, -9, -5, -2, 2, 5, 9, 12, 17, 22, 29, 46 },
          { -51, -25, -19, -11, -8, -6, -3, -1, 1, 4, 8, 9, 12, 18, 27, 52 } },
        { { -7, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 7, 6 },
          { -11, -6, -4, -3, -3, -1, -1, 0, 0, 1, 1, 2, 2, 5, 11, 6 } }, 2,
    }, {
        { 18635, 50727, 32485, 38497 }, { 111, 59539, 36897, 49105 },
        { { -46, -29, -23, -16, -12, -9, -4, -1, 1, 5, 9, 12, 17, 22, 30, 47 },
          { -50, -23, -17, -9, -8, -6, -3, -1, 1, 4, 8, 9, 12, 17, 26, 52 } },
        { { -11, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 9 },
          { -12, -4, -4, -4, -2, -2, -1, 0, 1, 1, 2, 2, 3, 5, 5, 11 } }, 3,
    },
};

static const float ccq_levels[4] = { 13/16.0f, 15/16.0f, 17/16.0f, 21/16.0f };

static float ccq_scale(uint8_t d) {
    if (d < 2) {
        return 0.0f;
    }
    const uint32_t bits = ((uint32_t) (d & 254) << 19) + (107u << 23);
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

// nearest scale that is not zero, as a number of steps; anything that is no positive number gives the smallest
static int ccq_nearest_scale(float d) {
    if (!(d > 0.0f)) {
        return 1;
    }
    uint32_t bits;
    memcpy(&bits, &d, sizeof(bits));
    const int64_t u = ((int64_t) bits + (1 << 19) - ((int64_t) 107 << 23)) >> 20;
    return (int) (u < 1 ? 1 : u > 127 ? 127 : u);
}

static size_t ccq_block_bytes(const ggml_ccq_code * code) {
    return 2 + N_STEPS + 8*(size_t) code->e_bits;
}

static unsigned ccq_index(const ggml_ccq_code * code, int p, const uint8_t * qs, const uint8_t * e, int b) {
    const unsigned window = qs[b] | (unsigned) qs[(b + 1) % N_STEPS] << 8;
    return ((window*code->k[p] + (unsigned) e[b]*code->m[p]) & 0xFFFF) >> 8;
}

static int ccq_level(const ggml_ccq_code * code, int table, unsigned h) {
    return code->t1[table][h >> 4] + code->t2[table][h & 15];
}

static void ccq_unpack_e(const ggml_ccq_code * code, const uint8_t * src, uint8_t * e) {
    memset(e, 0, N_STEPS);
    if (code->e_bits >= 2) {
        for (int b = 0; b < N_STEPS; b++) {
            e[b] = (src[b % 16] >> 2*(b/16)) & 3;
        }
        src += 16;
    }
    if (code->e_bits & 1) {
        for (int b = 0; b < N_STEPS; b++) {
            e[b] |= ((src[b % 8] >> (b/8)) & 1) << (code->e_bits - 1);
        }
    }
}

static void ccq_pack_e(const ggml_ccq_code * code, const uint8_t * e, uint8_t * dst) {
    memset(dst, 0, 8*(size_t) code->e_bits);
    if (code->e_bits >= 2) {
        for (int b = 0; b < N_STEPS; b++) {
            dst[b % 16] |= (e[b] & 3) << 2*(b/16);
        }
        dst += 16;
    }
    if (code->e_bits & 1) {
        for (int b = 0; b < N_STEPS; b++) {
            dst[b % 8] |= ((e[b] >> (code->e_bits - 1)) & 1) << (b/8);
        }
    }
}

// ---------------------------------------------------------------- decoding

void ggml_ccq_decode(const ggml_ccq_code * code, const uint8_t * src, int64_t n_blocks, float * y) {
    const size_t size = ccq_block_bytes(code);
    uint8_t      e[N_STEPS];
    for (int64_t i = 0; i < n_blocks; i++, src += size, y += QK_CCQ) {
        const float     d  = ccq_scale(src[0]);
        const uint8_t * qs = src + 2;
        ccq_unpack_e(code, qs + N_STEPS, e);
        for (int p = 0; p < 4; p++) {
            const float dl = d * ccq_levels[(src[1] >> 2*p) & 3];
            for (int b = 0; b < N_STEPS; b++) {
                y[64*p + b] = (float) ccq_level(code, src[0] & 1, ccq_index(code, p, qs, e, b)) * dl;
            }
        }
    }
}

void dequantize_row_ccq2(const block_ccq2 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[0], (const uint8_t *) x, k/QK_CCQ, y);
}

void dequantize_row_ccq2_25(const block_ccq2_25 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[1], (const uint8_t *) x, k/QK_CCQ, y);
}

void dequantize_row_ccq2_5(const block_ccq2_5 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[2], (const uint8_t *) x, k/QK_CCQ, y);
}

void dequantize_row_ccq2_75(const block_ccq2_75 * x, float * y, int64_t k) {
    ggml_ccq_decode(&ggml_ccq_codes[3], (const uint8_t *) x, k/QK_CCQ, y);
}

static float ccq_read_f32(const uint8_t * p) {
    const uint32_t bits = p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static float ccq_read_bf16(const uint8_t * p) {
    const uint32_t bits = (uint32_t) p[0] << 16 | (uint32_t) p[1] << 24;
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

void dequantize_row_ccq2_b(const block_ccq2_b * x, float * y, int64_t k) {
    for (int64_t i = 0; i < k/QK_CCQ_B; i++, y += QK_CCQ_B) {
        const float cs  = ccq_read_f32(x[i].code_scale);
        const float zp5 = ccq_read_f32(x[i].code_zp) + 0.5f;
        const float ss  = ccq_read_bf16(x[i].super_bf16);
        for (int j = 0; j < 128; j++) {
            const float    t = floorf(fmaf((float) x[i].qs[j], cs, zp5));
            const unsigned v = fabsf(t) < 1073741824.0f ? (unsigned) (int) t : 0; // also for NaN
            const int      g = j/16;
            const float    s = (float) ((x[i].ls[g/2] >> (g % 2 ? 0 : 4)) & 15) * ss;
            for (int r = 0; r < 4; r++) {
                y[4*j + r] = (float) ((int) ((v >> (9 - 3*r)) & 63) - 32) * s;
            }
        }
    }
}

int64_t ggml_ccq_find_bad(const float * x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (!(fabsf(x[i]) <= FLT_MAX)) {
            return i;
        }
    }
    return -1;
}

int64_t ggml_ccq2_b_find_bad(const block_ccq2_b * x, int64_t n_blocks) {
    for (int64_t i = 0; i < n_blocks; i++) {
        const float values[3] = { ccq_read_f32(x[i].code_scale), ccq_read_f32(x[i].code_zp), ccq_read_bf16(x[i].super_bf16) };
        if (ggml_ccq_find_bad(values, 3) >= 0) {
            return i;
        }
    }
    return -1;
}

// ---------------------------------------------------------------- encoding
//
// The state is the byte of the step before, a row is (refinement bits, old state). Since
//     h = ((old*K + e*M) >> 8) + new*K  (mod 256),  K odd,
// the levels of one row are those of another, rotated, once the new states are numbered by new*K. So a step needs
// one table of 256 costs per plane (stored twice), and a row reads it from where its rotation starts.
//
// Costs are integers of 16 bits, so every machine finds the same path, and twice as many fit a vector as of 32. Only the
// least costs are kept on the way forward; which row they came from is found on the way back, where one state a step
// matters: the lowest of the rows that cost so much.

#define COST_UNIT 1024.0f // the cost of an error as large as a level
#define COST_MAX  8191    // of one weight, above its best level
#define BASE_BITS 15
#define BASE_MAX  ((1 << BASE_BITS) - 1) // of a state, above the best one; with four weights within 16 bits

typedef struct {
    const ggml_ccq_code * code;
    int     n_rows;               // 256 << e_bits
    float   sigma[2];             // root mean square of the levels of a table
    float   y[2][4][N_STATES];    // levels of a table and plane, in the order of rotation
    uint8_t start[N_STATES << CCQ_E_BITS_MAX][4]; // where a row starts
} ccq_trellis;

typedef struct {
    uint8_t d;
    uint8_t level[4];
    uint8_t qs[N_STEPS];
    uint8_t e[N_STEPS];
} ccq_path;

static void ccq_trellis_init(ccq_trellis * t, const ggml_ccq_code * code) {
    t->code   = code;
    t->n_rows = N_STATES << code->e_bits;
    for (int table = 0; table < 2; table++) {
        int64_t sum = 0;
        for (unsigned h = 0; h < 256; h++) {
            const int y = ccq_level(code, table, h);
            sum += y*y;
        }
        t->sigma[table] = (float) sqrt((double) sum/256);
    }
    for (int p = 0; p < 4; p++) {
        unsigned inverse = 1;
        while (((inverse*code->k[p]) & 255) != 1) {
            inverse += 2;
        }
        for (unsigned i = 0; i < N_STATES; i++) {
            for (int table = 0; table < 2; table++) {
                t->y[table][p][i] = (int8_t) ccq_level(code, table, (i*code->k[p]) & 255);
            }
        }
        for (int row = 0; row < t->n_rows; row++) {
            const unsigned a = (((unsigned) (row & 255)*code->k[p] + (unsigned) (row >> 8)*code->m[p]) >> 8) & 255;
            t->start[row][p] = (uint8_t) (a*inverse);
        }
    }
}

// Least cost of every new state from the old states named, above the least of all, which is returned.
CCQ_CLONES
static uint16_t ccq_step(const ccq_trellis * t, const uint8_t * old, int n_old, const uint16_t * base,
                         const uint16_t (*cost)[2*N_STATES], uint16_t * restrict best) {
    for (int s = 0; s < N_STATES; s++) {
        best[s] = UINT16_MAX;
    }
    for (int e = 0; e < t->n_rows; e += N_STATES) {
        for (int i = 0; i < n_old; i++) {
            const uint8_t  * start = t->start[e + old[i]];
            const uint16_t   a     = base[old[i]];
            const uint16_t * c0    = cost[0] + start[0];
            const uint16_t * c1    = cost[1] + start[1];
            const uint16_t * c2    = cost[2] + start[2];
            const uint16_t * c3    = cost[3] + start[3];
            for (int s = 0; s < N_STATES; s++) {
                const uint16_t c = (uint16_t) (a + c0[s] + c1[s] + c2[s] + c3[s]);
                best[s] = c < best[s] ? c : best[s];
            }
        }
    }
    uint16_t low = UINT16_MAX;
    for (int s = 0; s < N_STATES; s++) {
        low = best[s] < low ? best[s] : low;
    }
    for (int s = 0; s < N_STATES; s++) {
        const uint16_t above = (uint16_t) (best[s] - low);
        best[s] = above < BASE_MAX ? above : BASE_MAX;
    }
    return low;
}

// the n-th smallest of 256 values of at most BASE_MAX, n from 1
CCQ_CLONES
static uint16_t ccq_nth(const uint16_t * values, int n) {
    uint16_t v = 0;
    for (int bit = 1 << (BASE_BITS - 1); bit > 0; bit /= 2) {
        const uint16_t up = (uint16_t) (v + bit);
        uint16_t n_below = 0;
        for (int s = 0; s < N_STATES; s++) {
            n_below += values[s] < up;
        }
        v = n_below < n ? up : v;
    }
    return v;
}

// costs of one weight for the values v, less the smallest
CCQ_CLONES
static void ccq_costs(const float * v, float x, float w, float unit, uint16_t * cost) {
    float c[N_STATES];
    float lows[16]; // one of each lane: compilers do not reorder the minimum of floats
    for (int s = 0; s < N_STATES; s++) {
        c[s] = w*(v[s]*(v[s] - 2.0f*x));
    }
    memcpy(lows, c, sizeof(lows));
    for (int s = 16; s < N_STATES; s += 16) {
        for (int i = 0; i < 16; i++) {
            lows[i] = c[s + i] < lows[i] ? c[s + i] : lows[i];
        }
    }
    float low = lows[0];
    for (int i = 1; i < 16; i++) {
        low = lows[i] < low ? lows[i] : low;
    }
    for (int s = 0; s < N_STATES; s++) {
        const float over = (c[s] - low)*unit;
        cost[s] = (uint16_t) (int) (over < (float) COST_MAX ? over : (float) COST_MAX);
    }
}

// old states from which a step goes on: the one that is fixed, or all of at most this cost
static int ccq_old_states(const uint16_t * base, int most, int fix, uint8_t * old) {
    if (fix >= 0) {
        old[0] = (uint8_t) fix;
        return 1;
    }
    int n = 0;
    for (int s = 0; s < N_STATES; s++) {
        old[n] = (uint8_t) s;
        n += base[s] <= most;
    }
    return n;
}

// Best path through n steps from step first on. fix: the state before the first and after the last step, or -1 for any.
// qs[i], e[i]: byte and refinement bits of the i-th step.
static void ccq_viterbi(const ccq_trellis * t, const uint16_t (*costs)[4][N_STATES], int first, int n, int beam, int fix,
                        uint8_t * qs, uint8_t * e) {
    uint16_t base[N_STEPS + 1][N_STATES]; // of a state before the step
    uint16_t low[N_STEPS];
    uint16_t cost[4][2*N_STATES];
    uint8_t  old[N_STEPS][N_STATES];      // the states that the beam keeps
    int      n_old[N_STEPS];

    memset(base[0], 0, sizeof(base[0]));
    for (int i = 0; i < n; i++) {
        const uint16_t (*c)[N_STATES] = costs[(first + i) % N_STEPS];
        for (int p = 0; p < 4; p++) {
            memcpy(cost[p],            c[p], sizeof(c[p]));
            memcpy(cost[p] + N_STATES, c[p], sizeof(c[p]));
        }
        const uint16_t limit = i > 0 && beam < N_STATES ? ccq_nth(base[i], beam) : BASE_MAX;
        n_old[i] = ccq_old_states(base[i], limit, i == 0 ? fix : -1, old[i]);
        low[i]   = ccq_step(t, old[i], n_old[i], base[i], (const uint16_t (*)[2*N_STATES]) cost, base[i + 1]);
    }
    int s = fix;
    if (s < 0) {
        s = 0;
        for (int i = 1; i < N_STATES; i++) {
            s = base[n][i] < base[n][s] ? i : s;
        }
    }
    for (int i = n - 1; i >= 0; i--) {
        const uint16_t (*c)[N_STATES] = costs[(first + i) % N_STEPS];
        const int target = base[i + 1][s] < BASE_MAX ? base[i + 1][s] + low[i] : UINT16_MAX; // what the best row costs
        int least = UINT16_MAX + 1;
        int best  = 0;
        for (int row = 0; row < t->n_rows && least > target; row += N_STATES) {
            for (int j = 0; j < n_old[i]; j++) {
                const int above = base[i][old[i][j]];
                if (above > target) {
                    continue;
                }
                const uint8_t * start = t->start[row + old[i][j]];
                const int total = above + c[0][(start[0] + s) & 255] + c[1][(start[1] + s) & 255]
                                        + c[2][(start[2] + s) & 255] + c[3][(start[3] + s) & 255];
                if (total < least) {
                    least = total;
                    best  = row + old[i][j];
                }
            }
        }
        e[i]  = (uint8_t) (best >> 8);
        qs[i] = (uint8_t) best;
        s     = best & 255;
    }
}

// tail-biting: the byte at the seam from a window around it, then all steps from it to it
static void ccq_search(const ccq_trellis * t, const float * x, const float * w, const float * gain, int beam, ccq_path * path) {
    uint16_t costs[N_STEPS][4][N_STATES];
    const double sigma = t->sigma[path->d & 1];
    double energy = 0;
    for (int p = 0; p < 4; p++) {
        double sum_w = 0;
        for (int b = 0; b < N_STEPS; b++) {
            sum_w += (double) w[64*p + b];
        }
        energy += sum_w*((double) gain[p]*(double) gain[p]);
    }
    const float unit = (float) ((double) COST_UNIT*QK_CCQ/(energy*(sigma*sigma)));
    for (int p = 0; p < 4; p++) {
        float v[N_STATES];
        for (int s = 0; s < N_STATES; s++) {
            v[s] = gain[p]*t->y[path->d & 1][p][s];
        }
        for (int b = 0; b < N_STEPS; b++) {
            ccq_costs(v, x[64*p + b], w[64*p + b], unit, costs[b][p]);
        }
    }
    const uint16_t (*c)[4][N_STATES] = (const uint16_t (*)[4][N_STATES]) costs;
    ccq_viterbi(t, c, N_STEPS - N_SEAM/2, N_SEAM, beam, -1, path->qs, path->e);
    ccq_viterbi(t, c, 0, N_STEPS, beam, path->qs[N_SEAM/2], path->qs, path->e);
}

// The best scale and levels for the codes of a path; the error that they leave, less that of a block of zeros.
// 0 if none is better than zeros, and then the path stays as it is.
static double ccq_refit(const ccq_trellis * t, const float * x, const float * w, ccq_path * path) {
    const int table = path->d & 1;
    double xy[4];
    double yy[4];
    double sum_xy = 0;
    double sum_yy = 0;
    for (int p = 0; p < 4; p++) {
        xy[p] = 0;
        yy[p] = 0;
        for (int b = 0; b < N_STEPS; b++) {
            const double y  = ccq_level(t->code, table, ccq_index(t->code, p, path->qs, path->e, b));
            const double wy = (double) w[64*p + b]*y;
            xy[p] += wy*(double) x[64*p + b];
            yy[p] += wy*y;
        }
        const double level = ccq_levels[path->level[p]];
        sum_xy += xy[p]*level;
        sum_yy += yy[p]*(level*level);
    }
    const int nearest = ccq_nearest_scale(sum_yy > 0 ? (float) (sum_xy/sum_yy) : 0.0f);
    double best = 0;
    for (int u = nearest - 3; u <= nearest + 3; u++) {
        if (u < 1 || u > 127) {
            continue;
        }
        double  error    = 0;
        uint8_t level[4] = { 0 };
        for (int p = 0; p < 4; p++) {
            double low = 0;
            for (int l = 0; l < 4; l++) {
                const double g = (double) (ccq_scale((uint8_t) (2*u))*ccq_levels[l]);
                const double c = (g*yy[p] - 2*xy[p])*g;
                if (l == 0 || c < low) {
                    low      = c;
                    level[p] = (uint8_t) l;
                }
            }
            error += low;
        }
        if (error < best) {
            best    = error;
            path->d = (uint8_t) (2*u + table);
            memcpy(path->level, level, sizeof(level));
        }
    }
    return best;
}

// scale and levels that give the planes of the block the energy they have
static void ccq_first_scale(const ccq_trellis * t, const float * x, const float * w, int table, ccq_path * path) {
    double rms[4];
    double sum_w  = 0;
    double sum_xx = 0;
    for (int p = 0; p < 4; p++) {
        double plane_w  = 0;
        double plane_xx = 0;
        for (int b = 0; b < N_STEPS; b++) {
            plane_w  += (double) w[64*p + b];
            plane_xx += ((double) w[64*p + b]*(double) x[64*p + b])*(double) x[64*p + b];
        }
        rms[p]  = plane_w > 0 ? sqrt(plane_xx/plane_w) : 0;
        sum_w  += plane_w;
        sum_xx += plane_xx;
    }
    const double sigma = t->sigma[table];
    path->d = (uint8_t) (2*ccq_nearest_scale((float) (sqrt(sum_xx/sum_w)/sigma)) + table);
    const double unit = (double) ccq_scale(path->d)*sigma;
    for (int p = 0; p < 4; p++) {
        path->level[p] = 0;
        for (int l = 1; l < 4; l++) {
            if (fabs(rms[p]/unit - (double) ccq_levels[l]) < fabs(rms[p]/unit - (double) ccq_levels[path->level[p]])) {
                path->level[p] = (uint8_t) l;
            }
        }
    }
}

// One search and refit from the scale and levels of a path: the error that it leaves, less that of a block of zeros.
// Taken if it is better than the best so far.
static double ccq_pass(const ccq_trellis * t, const float * x, const float * w, int beam, ccq_path path, ccq_path * best, double * best_error) {
    float gain[4];
    for (int p = 0; p < 4; p++) {
        gain[p] = ccq_scale(path.d)*ccq_levels[path.level[p]];
    }
    ccq_search(t, x, w, gain, beam, &path);
    const double error = ccq_refit(t, x, w, &path);
    if (error < *best_error) {
        *best_error = error;
        *best       = path;
    }
    return error;
}

// Passes from larger and larger scales than that of a path, which left the error low, as long as that helps, or else
// from smaller and smaller ones: the scale that was best.
static int ccq_climb(const ccq_trellis * t, const float * x, const float * w, int beam, ccq_path path, double low,
                     ccq_path * best, double * best_error) {
    const int table = path.d & 1;
    const int u     = path.d >> 1;
    int       top   = u;
    for (int step = 1; step >= -1 && top == u; step -= 2) {
        for (int v = u + step; v >= 1 && v <= 127; v += step) {
            path.d = (uint8_t) (2*v + table);
            const double error = ccq_pass(t, x, w, beam, path, best, best_error);
            if (!(error < low)) {
                break;
            }
            low = error;
            top = v;
        }
    }
    return top;
}

// Few states tell which table and about which scale; more of them the scale; all of them (half where a step has eight
// refinements) the path.
static void ccq_encode_block(const ccq_trellis * t, const float * x, const float * w, int beam, ccq_path * best) {
    const int few  = BEAM(beam > 24 ? beam/6 : 4);
    const int last = BEAM(t->code->e_bits < 3 ? N_STATES : N_STATES/2);
    double best_error = 0; // less that of a block of zeros, here and below
    double energy     = 0;
    int    moved      = 0;
    for (int i = 0; i < QK_CCQ; i++) {
        energy += ((double) w[i]*(double) x[i])*(double) x[i];
    }
    memset(best, 0, sizeof(*best));
    for (int table = 0; table < 2; table++) {
        ccq_path path;
        ccq_first_scale(t, x, w, table, &path);
        const int first = path.d >> 1;
        const int u     = first + moved < 1 ? 1 : first + moved > 127 ? 127 : first + moved;
        path.d = (uint8_t) (2*u + table);
        const double so_far = best_error;
        const double error  = ccq_pass(t, x, w, few, path, best, &best_error);
        if (table == 1 && energy + error > 1.1*(energy + so_far)) {
            break; // so much worse that no other scale would help
        }
        moved = ccq_climb(t, x, w, few, path, error, best, &best_error) - first;
    }
    if (best->d >= 2) {
        ccq_pass (t, x, w, beam, *best, best, &best_error);
        ccq_climb(t, x, w, beam, *best, best_error, best, &best_error);
    }
    for (int pass = 0; pass < 3 && best->d >= 2; pass++) {
        const ccq_path before = *best;
        ccq_pass(t, x, w, last, before, best, &best_error);
        if (best->d == before.d && memcmp(best->level, before.level, sizeof(before.level)) == 0) {
            break; // the next pass would find the same
        }
    }
}

// what the search sees: finite values, importances of at most 1; all equal if none is positive
static void ccq_clean(const float * x, const float * weights, float * cx, float * cw) {
    const float x_max = 1e15f; // far beyond any scale; keeps the costs finite
    float       w_max = 0;
    for (int i = 0; i < QK_CCQ; i++) {
        const float v = fabsf(x[i]) <= FLT_MAX ? x[i] : 0.0f;
        float       w = weights ? weights[i] : 1.0f;
        w     = w > 0 ? (w <= FLT_MAX ? w : FLT_MAX) : 0.0f;
        cx[i] = v > x_max ? x_max : v < -x_max ? -x_max : v;
        cw[i] = fabsf(x[i]) <= FLT_MAX ? w : 0.0f;
        w_max = cw[i] > w_max ? cw[i] : w_max;
    }
    for (int i = 0; i < QK_CCQ; i++) {
        cw[i] = w_max > 0 ? cw[i]/w_max : 1.0f;
    }
}

void ggml_ccq_encode(const ggml_ccq_code * code, const float * x, const float * weights, int64_t n_blocks, int beam, uint8_t * dst) {
    ccq_trellis t;
    ccq_trellis_init(&t, code);
    float    cx[QK_CCQ];
    float    cw[QK_CCQ];
    ccq_path path;
    for (int64_t i = 0; i < n_blocks; i++, dst += ccq_block_bytes(code)) {
        ccq_clean(x + QK_CCQ*i, weights ? weights + QK_CCQ*i : NULL, cx, cw);
        ccq_encode_block(&t, cx, cw, BEAM(beam), &path);
        dst[0] = path.d;
        dst[1] = 0;
        for (int p = 0; p < 4; p++) {
            dst[1] |= path.level[p] << 2*p;
        }
        memcpy(dst + 2, path.qs, N_STEPS);
        ccq_pack_e(code, path.e, dst + 2 + N_STEPS);
    }
}

double ggml_ccq_code_error(const ggml_ccq_code * code, const float * x, int64_t n_blocks, const float gain[4], int beam, uint8_t * index) {
    ccq_trellis t;
    ccq_trellis_init(&t, code);
    float  ones[QK_CCQ];
    double sum = 0;
    for (int i = 0; i < QK_CCQ; i++) {
        ones[i] = 1.0f;
    }
    for (int64_t i = 0; i < n_blocks; i++, x += QK_CCQ) {
        ccq_path path = { 0 };
        ccq_search(&t, x, ones, gain, beam, &path);
        for (int p = 0; p < 4; p++) {
            for (int b = 0; b < N_STEPS; b++) {
                const unsigned h     = ccq_index(code, p, path.qs, path.e, b);
                const double   error = (double) x[64*p + b] - (double) gain[p]*ccq_level(code, 0, h);
                sum += error*error;
                if (index) {
                    index[QK_CCQ*i + 64*p + b] = (uint8_t) h;
                }
            }
        }
    }
    return sum;
}

// ---------------------------------------------------------------- rows

static size_t ccq_quantize(int type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    static const int beams[4] = { 128, 96, 96, 96 };
    const ggml_ccq_code * code     = &ggml_ccq_codes[type];
    const int64_t         n_blocks = n_per_row/QK_CCQ;
    uint8_t             * out      = dst;
    for (int64_t row = 0; row < nrows; row++) {
        ggml_ccq_encode(code, src + row*n_per_row, imatrix, n_blocks, beams[type], out);
        out += (size_t) n_blocks*ccq_block_bytes(code);
    }
    return (size_t) (out - (uint8_t *) dst);
}

size_t quantize_ccq2(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return ccq_quantize(0, src, dst, nrows, n_per_row, imatrix);
}

size_t quantize_ccq2_25(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return ccq_quantize(1, src, dst, nrows, n_per_row, imatrix);
}

size_t quantize_ccq2_5(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return ccq_quantize(2, src, dst, nrows, n_per_row, imatrix);
}

size_t quantize_ccq2_75(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    return ccq_quantize(3, src, dst, nrows, n_per_row, imatrix);
}

// ---------------------------------------------------------------- Baidu's code, for tests

#define CCQ_B_SCALE 120.0f                          // the best single code_scale for Gaussian weights
#define CCQ_B_ZERO  (16384.0f - 127.5f*CCQ_B_SCALE) // centres the words

static void ccq2_b_best(const int8_t (*codes)[4], const float * x, const float * w, float scale, uint8_t * qs, double * xy, double * yy) {
    *xy = 0;
    *yy = 0;
    for (int j = 0; j < 16; j++) {
        float low = FLT_MAX;
        for (int q = 0; q < 256; q++) {
            float error = 0;
            for (int r = 0; r < 4; r++) {
                const float v = scale*(float) codes[q][r];
                error += w[4*j + r]*(v*(v - 2.0f*x[4*j + r]));
            }
            if (error < low) {
                low   = error;
                qs[j] = (uint8_t) q;
            }
        }
        for (int r = 0; r < 4; r++) {
            const double y = codes[qs[j]][r];
            *xy += (double) w[4*j + r]*(double) x[4*j + r]*y;
            *yy += (double) w[4*j + r]*y*y;
        }
    }
}

static void ccq2_b_encode_block(const int8_t (*codes)[4], const float * x, const float * w, block_ccq2_b * block) {
    float scale[8];
    float largest = 0;
    for (int g = 0; g < 8; g++) {
        double xy;
        double yy;
        double xx = 0;
        for (int i = 0; i < 64; i++) {
            xx += (double) x[64*g + i]*(double) x[64*g + i];
        }
        scale[g] = (float) (0.06*sqrt(xx/64));
        ccq2_b_best(codes, x + 64*g, w + 64*g, scale[g], block->qs + 16*g, &xy, &yy);
        scale[g] = yy > 0 && xy > 0 ? (float) (xy/yy) : 0.0f;
        largest  = scale[g] > largest ? scale[g] : largest;
    }
    uint32_t bits;
    const float unit = largest/15.0f;
    memcpy(&bits, &unit, sizeof(bits));
    bits = (bits + 0x8000) & 0xFFFF0000;
    float super;
    memcpy(&super, &bits, sizeof(super));
    block->super_bf16[0] = (uint8_t) (bits >> 16);
    block->super_bf16[1] = (uint8_t) (bits >> 24);
    memset(block->ls, 0, sizeof(block->ls));
    for (int g = 0; g < 8; g++) {
        double xy;
        double yy;
        const float ratio = super > 0 ? scale[g]/super + 0.5f : 0.0f;
        const int   local = ratio < 15.0f ? (int) ratio : 15;
        block->ls[g/2] |= (uint8_t) (local << (g % 2 ? 0 : 4));
        ccq2_b_best(codes, x + 64*g, w + 64*g, (float) local*super, block->qs + 16*g, &xy, &yy);
    }
}

size_t quantize_ccq2_b(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    const float scale = CCQ_B_SCALE;
    const float zero  = CCQ_B_ZERO;
    int8_t codes[256][4];
    for (int q = 0; q < 256; q++) {
        const int v = (int) floorf(fmaf((float) q, scale, zero + 0.5f));
        for (int r = 0; r < 4; r++) {
            codes[q][r] = (int8_t) (((v >> (9 - 3*r)) & 63) - 32);
        }
    }
    block_ccq2_b * out = dst;
    float cx[QK_CCQ_B];
    float cw[QK_CCQ_B];
    for (int64_t i = 0; i < nrows*(n_per_row/QK_CCQ_B); i++, out++) {
        const int64_t  first = i % (n_per_row/QK_CCQ_B)*QK_CCQ_B;
        for (int half = 0; half < 2; half++) {
            ccq_clean(src + QK_CCQ_B*i + QK_CCQ*half, imatrix ? imatrix + first + QK_CCQ*half : NULL, cx + QK_CCQ*half, cw + QK_CCQ*half);
        }
        memcpy(out->code_scale, &scale, sizeof(scale));
        memcpy(out->code_zp,    &zero,  sizeof(zero));
        ccq2_b_encode_block((const int8_t (*)[4]) codes, cx, cw, out);
    }
    return (size_t) (nrows*(n_per_row/QK_CCQ_B))*sizeof(block_ccq2_b);
}

// ---------------------------------------------------------------- for ggml's tables

void quantize_row_ccq2_ref   (const float * x, void * y, int64_t k) { quantize_ccq2   (x, y, 1, k, NULL); }
void quantize_row_ccq2_25_ref(const float * x, void * y, int64_t k) { quantize_ccq2_25(x, y, 1, k, NULL); }
void quantize_row_ccq2_5_ref (const float * x, void * y, int64_t k) { quantize_ccq2_5 (x, y, 1, k, NULL); }
void quantize_row_ccq2_75_ref(const float * x, void * y, int64_t k) { quantize_ccq2_75(x, y, 1, k, NULL); }
void quantize_row_ccq2_b_ref (const float * x, void * y, int64_t k) { quantize_ccq2_b (x, y, 1, k, NULL); }

int ggml_ccq_validate(int id, const void * data, size_t n_blocks) {
    return id != 116 || ggml_ccq2_b_find_bad(data, (int64_t) n_blocks) < 0;
}
