// Encoding blocks and rows of the native CCQ types: scale, levels and path of a block, by turns. The search for a path is
// in ggml-ccq-search.c.
// Same arithmetic, in the same order, as pyllamaernie/quant/ccq.py, so the bytes are equal; build with -ffp-contract=off.

#include "ggml-ccq-impl.h"

#include <float.h>
#include <math.h>

#ifdef CCQ_EXACT  // what bench/ccq_encoder.py compares with: no search leaves a state out
#define BEAM(n) (n > 0 ? N_STATES : 0)
#else
#define BEAM(n) (n)
#endif

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

static void ccq_pack_e(const ggml_ccq_code * code, const uint8_t * e, uint8_t * dst) {
    memset(dst, 0, 8 * (size_t) code->e_bits);
    if (code->e_bits >= 2) {
        for (int b = 0; b < N_STEPS; b++) {
            dst[b % 16] |= (e[b] & 3) << 2 * (b / 16);
        }
        dst += 16;
    }
    if (code->e_bits & 1) {
        for (int b = 0; b < N_STEPS; b++) {
            dst[b % 8] |= ((e[b] >> (code->e_bits - 1)) & 1) << (b / 8);
        }
    }
}

// The best scale and levels for the codes of a path; the error that they leave, less that of a block of zeros.
// 0 if none is better than zeros, and then the path stays as it is.
static double ccq_refit(const ccq_trellis * t, const float * x, const float * w, ccq_path * path) {
    const int table = path->d & 1;
    double    xy[4];
    double    yy[4];
    double    sum_xy = 0;
    double    sum_yy = 0;
    for (int p = 0; p < 4; p++) {
        xy[p] = 0;
        yy[p] = 0;
        for (int b = 0; b < N_STEPS; b++) {
            const double y  = ccq_level(t->code, table, ccq_index(t->code, p, path->qs, path->e, b));
            const double wy = (double) w[64 * p + b] * y;
            xy[p] += wy * (double) x[64 * p + b];
            yy[p] += wy * y;
        }
        const double level = ccq_levels[path->level[p]];
        sum_xy += xy[p] * level;
        sum_yy += yy[p] * (level * level);
    }
    const int nearest = ccq_nearest_scale(sum_yy > 0 ? (float) (sum_xy / sum_yy) : 0.0f);
    double    best    = 0;
    for (int u = nearest - 3; u <= nearest + 3; u++) {
        if (u < 1 || u > 127) {
            continue;
        }
        double  error    = 0;
        uint8_t level[4] = { 0 };
        for (int p = 0; p < 4; p++) {
            double low = 0;
            for (int l = 0; l < 4; l++) {
                const double g = (double) (ccq_scale((uint8_t) (2 * u)) * ccq_levels[l]);
                const double c = (g * yy[p] - 2 * xy[p]) * g;
                if (l == 0 || c < low) {
                    low      = c;
                    level[p] = (uint8_t) l;
                }
            }
            error += low;
        }
        if (error < best) {
            best    = error;
            path->d = (uint8_t) (2 * u + table);
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
            plane_w += (double) w[64 * p + b];
            plane_xx += ((double) w[64 * p + b] * (double) x[64 * p + b]) * (double) x[64 * p + b];
        }
        rms[p] = plane_w > 0 ? sqrt(plane_xx / plane_w) : 0;
        sum_w += plane_w;
        sum_xx += plane_xx;
    }
    const double sigma = t->sigma[table];
    path->d            = (uint8_t) (2 * ccq_nearest_scale((float) (sqrt(sum_xx / sum_w) / sigma)) + table);
    const double unit  = (double) ccq_scale(path->d) * sigma;
    for (int p = 0; p < 4; p++) {
        path->level[p] = 0;
        for (int l = 1; l < 4; l++) {
            if (fabs(rms[p] / unit - (double) ccq_levels[l]) <
                fabs(rms[p] / unit - (double) ccq_levels[path->level[p]])) {
                path->level[p] = (uint8_t) l;
            }
        }
    }
}

// One search and refit from the scale and levels of a path: the error that it leaves, less that of a block of zeros.
// Taken if it is better than the best so far.
static double ccq_pass(const ccq_trellis * t, const float * x, const float * w, int beam, ccq_path path,
    ccq_path * best, double * best_error) {
    float gain[4];
    for (int p = 0; p < 4; p++) {
        gain[p] = ccq_scale(path.d) * ccq_levels[path.level[p]];
    }
    ggml_ccq_search(t, x, w, gain, beam, &path);
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
            path.d             = (uint8_t) (2 * v + table);
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
    const int few        = BEAM(beam > 24 ? beam / 6 : 4);
    const int last       = BEAM(t->code->e_bits < 3 ? N_STATES : N_STATES / 2);
    double    best_error = 0;  // less that of a block of zeros, here and below
    double    energy     = 0;
    int       moved      = 0;
    for (int i = 0; i < QK_CCQ; i++) {
        energy += ((double) w[i] * (double) x[i]) * (double) x[i];
    }
    memset(best, 0, sizeof(*best));
    for (int table = 0; table < 2; table++) {
        ccq_path path;
        ccq_first_scale(t, x, w, table, &path);
        const int first     = path.d >> 1;
        const int u         = first + moved < 1 ? 1 : first + moved > 127 ? 127 : first + moved;
        path.d              = (uint8_t) (2 * u + table);
        const double so_far = best_error;
        const double error  = ccq_pass(t, x, w, few, path, best, &best_error);
        if (table == 1 && energy + error > 1.1 * (energy + so_far)) {
            break;  // so much worse that no other scale would help
        }
        moved = ccq_climb(t, x, w, few, path, error, best, &best_error) - first;
    }
    if (best->d >= 2) {
        ccq_pass(t, x, w, beam, *best, best, &best_error);
        ccq_climb(t, x, w, beam, *best, best_error, best, &best_error);
    }
    for (int pass = 0; pass < 3 && best->d >= 2; pass++) {
        const ccq_path before = *best;
        ccq_pass(t, x, w, last, before, best, &best_error);
        if (best->d == before.d && memcmp(best->level, before.level, sizeof(before.level)) == 0) {
            break;  // the next pass would find the same
        }
    }
}

void ggml_ccq_clean(const float * x, const float * weights, float * cx, float * cw) {
    const float x_max = 1e15f;  // far beyond any scale; keeps the costs finite
    float       w_max = 0;
    for (int i = 0; i < QK_CCQ; i++) {
        const float v = fabsf(x[i]) <= FLT_MAX ? x[i] : 0.0f;
        float       w = weights ? weights[i] : 1.0f;
        w             = w > 0 ? (w <= FLT_MAX ? w : FLT_MAX) : 0.0f;
        cx[i]         = v > x_max ? x_max : v < -x_max ? -x_max : v;
        cw[i]         = fabsf(x[i]) <= FLT_MAX ? w : 0.0f;
        w_max         = cw[i] > w_max ? cw[i] : w_max;
    }
    for (int i = 0; i < QK_CCQ; i++) {
        cw[i] = w_max > 0 ? cw[i] / w_max : 1.0f;
    }
}

void ggml_ccq_encode(
    const ggml_ccq_code * code, const float * x, const float * weights, int64_t n_blocks, int beam, uint8_t * dst) {
    ccq_trellis t;
    ggml_ccq_trellis_init(&t, code);
    float    cx[QK_CCQ];
    float    cw[QK_CCQ];
    ccq_path path;
    for (int64_t i = 0; i < n_blocks; i++, dst += ccq_block_bytes(code)) {
        ggml_ccq_clean(x + QK_CCQ * i, weights ? weights + QK_CCQ * i : NULL, cx, cw);
        ccq_encode_block(&t, cx, cw, BEAM(beam), &path);
        dst[0] = path.d;
        dst[1] = 0;
        for (int p = 0; p < 4; p++) {
            dst[1] |= path.level[p] << 2 * p;
        }
        memcpy(dst + 2, path.qs, N_STEPS);
        ccq_pack_e(code, path.e, dst + 2 + N_STEPS);
    }
}

double ggml_ccq_code_error(
    const ggml_ccq_code * code, const float * x, int64_t n_blocks, const float gain[4], int beam, uint8_t * index) {
    ccq_trellis t;
    ggml_ccq_trellis_init(&t, code);
    float  ones[QK_CCQ];
    double sum = 0;
    for (int i = 0; i < QK_CCQ; i++) {
        ones[i] = 1.0f;
    }
    for (int64_t i = 0; i < n_blocks; i++, x += QK_CCQ) {
        ccq_path path = { 0 };
        ggml_ccq_search(&t, x, ones, gain, beam, &path);
        for (int p = 0; p < 4; p++) {
            for (int b = 0; b < N_STEPS; b++) {
                const unsigned h     = ccq_index(code, p, path.qs, path.e, b);
                const double   error = (double) x[64 * p + b] - (double) gain[p] * ccq_level(code, 0, h);
                sum += error * error;
                if (index) {
                    index[QK_CCQ * i + 64 * p + b] = (uint8_t) h;
                }
            }
        }
    }
    return sum;
}

static size_t ccq_quantize(
    int type, const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix) {
    static const int      beams[4] = { 128, 96, 96, 96 };
    const ggml_ccq_code * code     = &ggml_ccq_codes[type];
    const int64_t         n_blocks = n_per_row / QK_CCQ;
    uint8_t *             out      = dst;
    for (int64_t row = 0; row < nrows; row++) {
        ggml_ccq_encode(code, src + row * n_per_row, imatrix, n_blocks, beams[type], out);
        out += (size_t) n_blocks * ccq_block_bytes(code);
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

// clang-format off
void quantize_row_ccq2_ref   (const float * x, void * y, int64_t k) { quantize_ccq2   (x, y, 1, k, NULL); }
void quantize_row_ccq2_25_ref(const float * x, void * y, int64_t k) { quantize_ccq2_25(x, y, 1, k, NULL); }
void quantize_row_ccq2_5_ref (const float * x, void * y, int64_t k) { quantize_ccq2_5 (x, y, 1, k, NULL); }
void quantize_row_ccq2_75_ref(const float * x, void * y, int64_t k) { quantize_ccq2_75(x, y, 1, k, NULL); }
// clang-format on
