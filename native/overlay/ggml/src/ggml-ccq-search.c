// The best path through the trellis of a CCQ block, by the Viterbi algorithm.
// Same arithmetic, in the same order, as pyllamaernie/quant/ccq.py, so the bytes are equal; build with -ffp-contract=off.
//
// The state is the byte of the step before, a row is (refinement bits, old state). Since
//     h = ((old*K + e*M) >> 8) + new*K  (mod 256),  K odd,
// the levels of one row are those of another, rotated, once the new states are numbered by new*K. So a step needs
// one table of 256 costs per plane (stored twice), and a row reads it from where its rotation starts.
//
// Costs are integers of 16 bits, so every machine finds the same path, and twice as many fit a vector as of 32. Only the
// least costs are kept on the way forward; which row they came from is found on the way back, where one state a step
// matters: the lowest of the rows that cost so much.

#include "ggml-ccq-impl.h"

#include <math.h>

#ifndef CCQ_CLONES
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// jamming two rows into one pass over the states leaves GCC 12 with scalar code, 6 times slower
#define CCQ_CLONES                                                                                                     \
    __attribute__((target_clones("arch=x86-64-v4", "avx2", "default"), optimize("no-loop-unroll-and-jam")))
#else
#define CCQ_CLONES
#endif
#endif

#define N_SEAM    24       // steps of the window from which the byte at the seam is read
#define COST_UNIT 1024.0f  // the cost of an error as large as a level
#define COST_MAX  8191     // of one weight, above its best level
#define BASE_BITS 15
#define BASE_MAX  ((1 << BASE_BITS) - 1)  // of a state, above the best one; with four weights within 16 bits

void ggml_ccq_trellis_init(ccq_trellis * t, const ggml_ccq_code * code) {
    t->code   = code;
    t->n_rows = N_STATES << code->e_bits;
    for (int table = 0; table < 2; table++) {
        int64_t sum = 0;
        for (unsigned h = 0; h < 256; h++) {
            const int y = ccq_level(code, table, h);
            sum += y * y;
        }
        t->sigma[table] = (float) sqrt((double) sum / 256);
    }
    for (int p = 0; p < 4; p++) {
        unsigned inverse = 1;
        while (((inverse * code->k[p]) & 255) != 1) {
            inverse += 2;
        }
        for (unsigned i = 0; i < N_STATES; i++) {
            for (int table = 0; table < 2; table++) {
                t->y[table][p][i] = (int8_t) ccq_level(code, table, (i * code->k[p]) & 255);
            }
        }
        for (int row = 0; row < t->n_rows; row++) {
            const unsigned a = (((unsigned) (row & 255) * code->k[p] + (unsigned) (row >> 8) * code->m[p]) >> 8) & 255;
            t->start[row][p] = (uint8_t) (a * inverse);
        }
    }
}

// Least cost of every new state from the old states named, above the least of all, which is returned.
CCQ_CLONES
static uint16_t ccq_step(const ccq_trellis * t, const uint8_t * old, int n_old, const uint16_t * base,
    const uint16_t (*cost)[2 * N_STATES], uint16_t * restrict best) {
    for (int s = 0; s < N_STATES; s++) {
        best[s] = UINT16_MAX;
    }
    for (int e = 0; e < t->n_rows; e += N_STATES) {
        for (int i = 0; i < n_old; i++) {
            const uint8_t *  start = t->start[e + old[i]];
            const uint16_t   a     = base[old[i]];
            const uint16_t * c0    = cost[0] + start[0];
            const uint16_t * c1    = cost[1] + start[1];
            const uint16_t * c2    = cost[2] + start[2];
            const uint16_t * c3    = cost[3] + start[3];
            for (int s = 0; s < N_STATES; s++) {
                const uint16_t c = (uint16_t) (a + c0[s] + c1[s] + c2[s] + c3[s]);
                best[s]          = c < best[s] ? c : best[s];
            }
        }
    }
    uint16_t low = UINT16_MAX;
    for (int s = 0; s < N_STATES; s++) {
        low = best[s] < low ? best[s] : low;
    }
    for (int s = 0; s < N_STATES; s++) {
        const uint16_t above = (uint16_t) (best[s] - low);
        best[s]              = above < BASE_MAX ? above : BASE_MAX;
    }
    return low;
}

// the n-th smallest of 256 values of at most BASE_MAX, n from 1
CCQ_CLONES
static uint16_t ccq_nth(const uint16_t * values, int n) {
    uint16_t v = 0;
    for (int bit = 1 << (BASE_BITS - 1); bit > 0; bit /= 2) {
        const uint16_t up      = (uint16_t) (v + bit);
        uint16_t       n_below = 0;
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
    float lows[16];  // one of each lane: compilers do not reorder the minimum of floats
    for (int s = 0; s < N_STATES; s++) {
        c[s] = w * (v[s] * (v[s] - 2.0f * x));
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
        const float over = (c[s] - low) * unit;
        cost[s]          = (uint16_t) (int) (over < (float) COST_MAX ? over : (float) COST_MAX);
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
static void ccq_viterbi(const ccq_trellis * t, const uint16_t (*costs)[4][N_STATES], int first, int n, int beam,
    int fix, uint8_t * qs, uint8_t * e) {
    uint16_t base[N_STEPS + 1][N_STATES];  // of a state before the step
    uint16_t low[N_STEPS];
    uint16_t cost[4][2 * N_STATES];
    uint8_t  old[N_STEPS][N_STATES];  // the states that the beam keeps
    int      n_old[N_STEPS];

    memset(base[0], 0, sizeof(base[0]));
    for (int i = 0; i < n; i++) {
        const uint16_t (*c)[N_STATES] = costs[(first + i) % N_STEPS];
        for (int p = 0; p < 4; p++) {
            memcpy(cost[p], c[p], sizeof(c[p]));
            memcpy(cost[p] + N_STATES, c[p], sizeof(c[p]));
        }
        const uint16_t limit = i > 0 && beam < N_STATES ? ccq_nth(base[i], beam) : BASE_MAX;
        n_old[i]             = ccq_old_states(base[i], limit, i == 0 ? fix : -1, old[i]);
        low[i] = ccq_step(t, old[i], n_old[i], base[i], (const uint16_t (*)[2 * N_STATES]) cost, base[i + 1]);
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
        const int target = base[i + 1][s] < BASE_MAX ? base[i + 1][s] + low[i] : UINT16_MAX;  // what the best row costs
        int       least  = UINT16_MAX + 1;
        int       best   = 0;
        for (int row = 0; row < t->n_rows && least > target; row += N_STATES) {
            for (int j = 0; j < n_old[i]; j++) {
                const int above = base[i][old[i][j]];
                if (above > target) {
                    continue;
                }
                const uint8_t * start = t->start[row + old[i][j]];
                const int       total = above + c[0][(start[0] + s) & 255] + c[1][(start[1] + s) & 255] +
                    c[2][(start[2] + s) & 255] + c[3][(start[3] + s) & 255];
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
void ggml_ccq_search(
    const ccq_trellis * t, const float * x, const float * w, const float * gain, int beam, ccq_path * path) {
    uint16_t     costs[N_STEPS][4][N_STATES];
    const double sigma  = t->sigma[path->d & 1];
    double       energy = 0;
    for (int p = 0; p < 4; p++) {
        double sum_w = 0;
        for (int b = 0; b < N_STEPS; b++) {
            sum_w += (double) w[64 * p + b];
        }
        energy += sum_w * ((double) gain[p] * (double) gain[p]);
    }
    const float unit = (float) ((double) COST_UNIT * QK_CCQ / (energy * (sigma * sigma)));
    for (int p = 0; p < 4; p++) {
        float v[N_STATES];
        for (int s = 0; s < N_STATES; s++) {
            v[s] = gain[p] * t->y[path->d & 1][p][s];
        }
        for (int b = 0; b < N_STEPS; b++) {
            ccq_costs(v, x[64 * p + b], w[64 * p + b], unit, costs[b][p]);
        }
    }
    const uint16_t (*c)[4][N_STATES] = (const uint16_t (*)[4][N_STATES]) costs;
    ccq_viterbi(t, c, N_STEPS - N_SEAM / 2, N_SEAM, beam, -1, path->qs, path->e);
    ccq_viterbi(t, c, 0, N_STEPS, beam, path->qs[N_SEAM / 2], path->qs, path->e);
}
