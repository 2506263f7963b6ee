#pragma once

// Runs CUDA kernels of the overlay on the CPU, thread block by thread block: enough of CUDA, and of the parts of ggml-cuda
// that they use, for ccq-kernels.cuh. Threads are coroutines that change at barriers only, warps and threads in an order the
// caller chooses, a warp as far ahead of the others as it can: where a barrier is missing, results are wrong. A barrier that
// not all threads reach ends the program. The number of warps, and of threads of a warp, is a power of two.
//
// Not the GPU: floats are not flushed to zero, and nothing is known about alignment, registers or time.

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define GGML_UNUSED_VARS(...)
#define NO_DEVICE_CODE
#define TURING_MMA_AVAILABLE

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---------------------------------------------------------------- threads

namespace emulator {

enum state { RUNS, AT_WARP, AT_BLOCK, DONE };

struct thread {
    ucontext_t        context;
    std::vector<char> stack;
    state             at;
    dim3              index;
    uint64_t          words[8]; // what it shows to its warp
};

static std::vector<thread>   threads;
static ucontext_t            scheduler;
static int                   current;
static std::function<void()> kernel;

static void body() {
    kernel();
    threads[current].at = DONE;
    swapcontext(&threads[current].context, &scheduler);
}

static void wait(state at) {
    threads[current].at = at;
    swapcontext(&threads[current].context, &scheduler);
}

static int lane() { return current % 32; }

static thread & in_warp(int lane) { return threads[current/32*32 + lane]; }

// Lets threads [first, last) go on if all that are not done wait for it.
static bool release(size_t first, size_t last, state at) {
    bool any = false;
    for (size_t i = first; i < last; i++) {
        if (threads[i].at != DONE && threads[i].at != at) {
            return false;
        }
        any |= threads[i].at == at;
    }
    for (size_t i = first; i < last; i++) {
        if (threads[i].at == at) {
            threads[i].at = RUNS;
        }
    }
    return any;
}

// The i-th of n in turn: forward, backward, or by an odd stride, which is prime to a power of two.
static int position(int i, int n, int order, int round) {
    return order == 0 ? i : order == 1 ? n - 1 - i : (i*(2*order + 1) + round) % n;
}

static void run_block(int order) {
    const int n = (int) threads.size();
    for (thread & t : threads) {
        getcontext(&t.context);
        t.stack.resize(1 << 16);
        t.context.uc_stack.ss_sp   = t.stack.data();
        t.context.uc_stack.ss_size = t.stack.size();
        t.context.uc_link          = nullptr;
        t.at = RUNS;
        makecontext(&t.context, body, 0);
    }
    const int n_warps = (n + 31)/32;
    for (int round = 0;; round++) {
        for (int i = 0; i < n_warps; i++) { // a warp goes as far as it can without the others
            const int warp  = position(i, n_warps, order, round);
            const int first = 32*warp;
            const int last  = first + 32 < n ? first + 32 : n;
            do {
                for (int j = 0; j < last - first; j++) {
                    current = first + position(j, last - first, order, round);
                    if (threads[current].at == RUNS) {
                        threadIdx = threads[current].index;
                        swapcontext(&scheduler, &threads[current].context);
                    }
                }
            } while (release(first, last, AT_WARP));
        }
        if (!release(0, n, AT_BLOCK)) {
            for (const thread & t : threads) {
                if (t.at != DONE) {
                    fprintf(stderr, "thread (%u, %u) waits for others that never come\n", t.index.x, t.index.y);
                    abort();
                }
            }
            return;
        }
    }
}

template <typename F> static void launch(dim3 grid, dim3 block, int order, F f) {
    kernel   = f;
    gridDim  = grid;
    blockDim = block;
    threads  = std::vector<thread>(block.x*block.y*block.z);
    for (size_t i = 0; i < threads.size(); i++) {
        threads[i].index = dim3(i % block.x, i/block.x % block.y, i/block.x/block.y);
    }
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = dim3(x, y, z);
                run_block(order);
            }
        }
    }
}

} // namespace emulator

static void __syncthreads() { emulator::wait(emulator::AT_BLOCK); }

static void __syncwarp() { emulator::wait(emulator::AT_WARP); }

// ---------------------------------------------------------------- instructions

// prmt.b32
static uint32_t emulated_prmt(uint32_t a, uint32_t b, uint32_t s) {
    const uint64_t bytes = (uint64_t) b << 32 | a;
    uint32_t d = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t byte = bytes >> 8*(s >> 4*i & 7) & 255;
        d |= (s >> 4*i & 8 ? (byte & 128 ? 255 : 0) : byte) << 8*i;
    }
    return d;
}

static int ggml_cuda_dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; i++) {
        c += (int8_t) ((uint32_t) a >> 8*i)*(int8_t) ((uint32_t) b >> 8*i);
    }
    return c;
}

template <int width> static float warp_reduce_sum(float x) {
    for (int offset = width/2; offset > 0; offset /= 2) {
        memcpy(emulator::threads[emulator::current].words, &x, sizeof(x));
        __syncwarp();
        float other;
        memcpy(&other, emulator::in_warp(emulator::lane() ^ offset).words, sizeof(other));
        __syncwarp();
        x += other;
    }
    return x;
}

// ---------------------------------------------------------------- types of ggml-cuda

typedef _Float16 half;
struct half2 { half x, y; };
struct nv_bfloat16 { uint16_t bits; };

struct block_q8_1 {
    half2  ds;
    int8_t qs[32];
};

static float __low2float(half2 v) { return (float) v.x; }

template <typename dst_t> static dst_t ggml_cuda_cast(float x) {
    if constexpr (std::is_same_v<dst_t, nv_bfloat16>) { // to nearest even; x is not NaN
        uint32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        return { (uint16_t) ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) };
    } else {
        return (dst_t) x;
    }
}

// Fragments of mma.sync.m16n8k32 on bytes, as the PTX manual draws them.
namespace ggml_cuda_mma {

template <int I_, int J_, typename T> struct tile {
    static constexpr int I = I_, J = J_, ne = I*J/32;
    T x[ne] = { 0 };

    static int get_i(int l) { return I == 8 ? emulator::lane()/4 : l/2*8 + emulator::lane()/4; }
    static int get_j(int l) { return I == 8 ? 4*l + emulator::lane() % 4 : emulator::lane() % 4 * 2 + l % 2; }
};

template <int I, int J> static void load_generic(tile<I, J, int> & t, const int * xs, int stride) {
    for (int l = 0; l < t.ne; l++) {
        t.x[l] = xs[t.get_i(l)*stride + t.get_j(l)];
    }
}

// ldmatrix.x4: register m of a lane is word lane % 4 of row lane/4 of matrix m, whose rows' addresses are in lanes 8m to 8m + 7
static void load_ldmatrix(tile<16, 8, int> & t, const int * xs, int stride) {
    const int * row = xs + emulator::lane() % 16 * stride + emulator::lane()/16*4;
    memcpy(emulator::threads[emulator::current].words, &row, sizeof(row));
    __syncwarp();
    for (int m = 0; m < 4; m++) {
        const int * source;
        memcpy(&source, emulator::in_warp(8*m + emulator::lane()/4).words, sizeof(source));
        if ((uintptr_t) source % 16 != 0) {
            fprintf(stderr, "ldmatrix reads from an address that is no multiple of 16\n");
            abort();
        }
        t.x[m] = source[emulator::lane() % 4];
    }
    __syncwarp();
}

static void mma(tile<16, 8, int> & d, const tile<16, 8, int> & a, const tile<8, 8, int> & b) {
    int * words = (int *) emulator::threads[emulator::current].words;
    memcpy(words, a.x, sizeof(a.x));
    memcpy(words + 4, b.x, sizeof(b.x));
    __syncwarp();
    for (int l = 0; l < 4; l++) {
        const int row = emulator::lane()/4 + l/2*8;
        const int col = emulator::lane() % 4 * 2 + l % 2;
        for (int k = 0; k < 8; k++) { // words of a row of a and of a column of b
            const int * wa = (const int *) emulator::in_warp(row % 8 * 4 + k % 4).words;
            const int * wb = (const int *) emulator::in_warp(col*4 + k % 4).words;
            d.x[l] = ggml_cuda_dp4a(wa[row/8 + k/4*2], wb[4 + k/4], d.x[l]);
        }
    }
    __syncwarp();
}

} // namespace ggml_cuda_mma
