#pragma once

// What mtmd.cpp needs to know of ERNIE 4.5 VL's media blocks.
//
// A block is one chunk: START, the merged patches of all frame pairs (pair, row, column), END. START and END take a
// text position each; the patches share the base that follows START.

#include "mtmd-image.h"
#include "mtmd-internal.h"
#include "pyllamaernie-vision.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

struct mtmd_image_preprocessor_ernie4_5_vl : mtmd_image_preprocessor {
    mtmd_image_preprocessor_ernie4_5_vl(const vision_ctx * ctx) : mtmd_image_preprocessor(ctx) {}
    mtmd_image_preproc_out preprocess(const vision_image_u8 & img) const override;
};

// how far the positions advance within the patches: nx, ny, nz = merged columns, merged rows, frame pairs
static llama_pos ernie4_5_vl_patches_n_pos(uint32_t nx, uint32_t ny, uint32_t nz) {
    return std::max(nz, std::max(nx, ny));
}

static mtmd_decoder_pos ernie4_5_vl_decoder_pos(
    uint32_t nx, uint32_t ny, uint32_t n_tokens, llama_pos pos_0, size_t i) {
    const uint32_t nz = (n_tokens - 2) / (nx * ny);

    mtmd_decoder_pos pos;
    if (i == 0 || i == n_tokens - 1) {
        pos.t = i == 0 ? pos_0 : pos_0 + 1 + ernie4_5_vl_patches_n_pos(nx, ny, nz);
        pos.x = pos.t;
        pos.y = pos.t;
    } else {
        const uint32_t ip = uint32_t(i) - 1;
        pos.t             = pos_0 + 1 + ip / (nx * ny);
        pos.y             = pos_0 + 1 + ip / nx % ny;
        pos.x             = pos_0 + 1 + ip % nx;
    }
    pos.z = 0;

    return pos;
}

static llama_pos ernie4_5_vl_n_pos(uint32_t nx, uint32_t ny, uint32_t n_tokens) {
    return 2 + ernie4_5_vl_patches_n_pos(nx, ny, (n_tokens - 2) / (nx * ny));
}

// Writes the template's "Picture {i}:" or "Video {i}:" in front of each medium.
void ernie4_5_vl_label_media(std::vector<mtmd_internal_part> & parts, bool parse_special);

// The frames of a video, each as a picture of the chunk.
void ernie4_5_vl_preprocess_video(
    const mtmd_image_preprocessor & preproc, const mtmd_bitmap & video, mtmd_image_preproc_out & output);
