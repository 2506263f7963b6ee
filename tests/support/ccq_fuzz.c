// Feeds random bytes as blocks to every reader of CCQ rows, and hostile numbers to every encoder. Built with sanitizers:
// buffers are exactly as long as they must be. Arguments: seed, rounds. Prints the sum of what was read and the path.

#include "ggml-cpu/ccq.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*to_float)(const void * x, float * y, int64_t k);
typedef size_t (*encode)(const float * src, void * dst, int64_t nrows, int64_t n_per_row, const float * imatrix);
typedef void (*dot)(int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc);

static const struct {
    int      id;
    int      block_size;
    size_t   block_bytes;
    to_float decode;
    encode   quantize;
    dot      vec_dot;
} types[] = {
    { 112, 256,  66, (to_float) dequantize_row_ccq2,    quantize_ccq2,    ggml_vec_dot_ccq2_q8_K    },
    { 113, 256,  74, (to_float) dequantize_row_ccq2_25, quantize_ccq2_25, ggml_vec_dot_ccq2_25_q8_K },
    { 114, 256,  82, (to_float) dequantize_row_ccq2_5,  quantize_ccq2_5,  ggml_vec_dot_ccq2_5_q8_K  },
    { 115, 256,  90, (to_float) dequantize_row_ccq2_75, quantize_ccq2_75, ggml_vec_dot_ccq2_75_q8_K },
    { 116, 512, 142, (to_float) dequantize_row_ccq2_b,  quantize_ccq2_b,  ggml_vec_dot_ccq2_b_q8_K  },
};

static uint64_t state;

static uint32_t draw(void) {
    state = state*6364136223846793005u + 1442695040888963407u;
    return (uint32_t) (state >> 33);
}

static void fill(void * data, size_t size) {
    for (size_t i = 0; i < size; i++) {
        ((uint8_t *) data)[i] = (uint8_t) (draw() >> 8);
    }
}

static float hostile(void) {
    static const float values[] = { 0, -0.0f, NAN, -NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, FLT_MIN, 1e-45f, -1e-40f,
                                    1e38f, -1e38f, 1e15f, 1e6f, 1, -1, 0.02f, 1e-20f, 1e-7f };
    return values[draw() % (sizeof(values)/sizeof(*values))];
}

static float ordinary(void) {
    return 0.02f*(float) ((double) draw()/(1u << 30) - 1.0);
}

static void * allocate(size_t size) {
    void * p = malloc(size);
    if (!p) {
        exit(2);
    }
    return p;
}

// random bytes as n_rows rows of n_blocks blocks
static double read_rows(int t, int n_rows, int n_blocks) {
    const int    n     = n_blocks*types[t].block_size;
    const size_t bytes = (size_t) n_blocks*types[t].block_bytes;
    uint8_t * rows = allocate(bytes*(size_t) n_rows);
    uint8_t * q8   = allocate((size_t) n/256*292); // Q8_K
    float   * y    = allocate((size_t) n*sizeof(float));
    float   * s    = allocate((size_t) n_rows*sizeof(float));
    double    sum  = 0;
    fill(rows, bytes*(size_t) n_rows);
    fill(q8, (size_t) n/256*292);
    for (int r = 0; r < n_rows; r++) {
        types[t].decode(rows + bytes*(size_t) r, y, n);
        for (int i = 0; i < n; i++) {
            if (types[t].id != 116 && !isfinite(y[i])) {
                printf("type %d: weight %d is %g\n", types[t].id, i, (double) y[i]);
                exit(3);
            }
        }
        types[t].vec_dot(n, s + r, 0, rows + bytes*(size_t) r, 0, q8, 0, 1);
        sum += isfinite(s[r]) ? (double) s[r] : 0;
    }
    if (!ggml_ccq_dot_rows(types[t].id, n, s, rows, bytes, n_rows, q8)) {
        exit(4);
    }
    if (types[t].id != 116) {
        float   * d      = allocate((size_t) n_rows*sizeof(float));
        int32_t * scales = allocate((size_t) n_rows*8*sizeof(int32_t));
        uint8_t * q      = allocate((size_t) n_rows*256);
        ggml_ccq_unpack_rows(types[t].id, rows, bytes, n_rows, d, scales, 8, q, 256);
        sum += q[draw() % ((unsigned) n_rows*256)];
        free(d);
        free(scales);
        free(q);
    }
    sum += ggml_ccq_validate(types[t].id, rows, (size_t) (n_rows*n_blocks));
    free(rows);
    free(q8);
    free(y);
    free(s);
    return sum;
}

// hostile numbers among ordinary ones, as weights and as importances
static void encode_rows(int t, int n_rows) {
    const int n = types[t].block_size;
    const unsigned share_x = draw() % 4 ? draw() % 8 : 256; // of 256
    const unsigned share_w = draw() % 4 ? draw() % 8 : 256;
    float   * x = allocate((size_t) (n*n_rows)*sizeof(float));
    float   * w = allocate((size_t) n*sizeof(float));
    float   * y = allocate((size_t) (n*n_rows)*sizeof(float));
    uint8_t * q = allocate(types[t].block_bytes*(size_t) n_rows);
    for (int i = 0; i < n*n_rows; i++) {
        x[i] = draw() % 256 < share_x ? hostile() : ordinary();
    }
    for (int i = 0; i < n; i++) {
        w[i] = draw() % 256 < share_w ? hostile() : fabsf(ordinary());
    }
    if (types[t].quantize(x, q, n_rows, n, draw() % 4 ? w : NULL) != types[t].block_bytes*(size_t) n_rows) {
        exit(5);
    }
    types[t].decode(q, y, (int64_t) n*n_rows);
    if (ggml_ccq_find_bad(y, (int64_t) n*n_rows) >= 0 || !ggml_ccq_validate(types[t].id, q, (size_t) n_rows)) {
        printf("type %d: encoded to what is not finite\n", types[t].id);
        exit(6);
    }
    free(x);
    free(w);
    free(y);
    free(q);
}

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 1;
    }
    state = (uint64_t) atoll(argv[1]);
    const int n_rounds = atoi(argv[2]);
    double sum = 0;
    for (int round = 0; round < n_rounds; round++) {
        for (int t = 0; t < 5; t++) {
            for (int n_rows = 1; n_rows <= 17; n_rows += 1 + (int) (draw() % 8)) {
                sum += read_rows(t, n_rows, 1 + (int) (draw() % 3));
            }
            if (round % 4 == 0) {
                encode_rows(t, 1 + (int) (draw() % 2));
            }
        }
    }
    printf("%g %s\n", sum, ggml_ccq_cpu_path());
    return 0;
}
