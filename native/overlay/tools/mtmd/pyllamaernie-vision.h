#pragma once

// Upstream's layer for vision towers, under our names: types, functions, keys, tensor names and enumerators. The only file
// of the overlay that says how upstream calls them, so that a new pin changes this file and hook-clip-projector.patch.

#include "clip.h"
#include "clip-graph.h"
#include "clip-impl.h"
#include "clip-model.h"

#include <string>
#include <vector>

//
// types
//

using vision_ctx         = clip_ctx;
using vision_graph       = clip_graph;
using vision_hparams     = clip_hparams;
using vision_layer       = clip_layer;
using vision_model       = clip_model;
using vision_image_size  = clip_image_size;
using vision_image_u8    = clip_image_u8;
using vision_image_f32   = clip_image_f32;
using vision_image_batch = clip_image_f32_batch;

//
// functions
//

static inline const vision_hparams * vision_get_hparams(const vision_ctx * ctx) {
    return clip_get_hparams(ctx);
}

// width of the rows that the tower gives to the language model
static inline int vision_n_embd_out(const vision_ctx * ctx) {
    return clip_n_mmproj_embd(ctx);
}

static inline int vision_n_tokens_out(const vision_ctx * ctx, const vision_image_f32 * img) {
    return clip_n_output_tokens(ctx, img);
}

static inline bool vision_encode(
    vision_ctx * ctx, int n_threads, const vision_image_batch * images, std::vector<float> & out_embd) {
    return clip_image_batch_encode(ctx, n_threads, images, out_embd);
}

//
// enumerators
//

static constexpr auto VISION_PROJECTOR_ERNIE4_5_VL = PROJECTOR_TYPE_ERNIE4_5_VL;

static constexpr auto VISION_FFN_GELU_ERF   = FFN_GELU_ERF;
static constexpr auto VISION_NORM_LAYER     = NORM_TYPE_NORMAL;
static constexpr auto VISION_NORM_RMS       = NORM_TYPE_RMS;
static constexpr auto VISION_PAD_NONE       = PAD_NONE;
static constexpr auto VISION_RESIZE_BICUBIC = RESIZE_ALGO_BICUBIC;

//
// metadata keys
//

static constexpr const char * VISION_KEY_SPATIAL_MERGE_SIZE  = KEY_SPATIAL_MERGE_SIZE;
static constexpr const char * VISION_KEY_IMAGE_MIN_PIXELS    = KEY_IMAGE_MIN_PIXELS;
static constexpr const char * VISION_KEY_IMAGE_MAX_PIXELS    = KEY_IMAGE_MAX_PIXELS;
static constexpr const char * VISION_KEY_VIDEO_MIN_PIXELS    = KEY_VIDEO_MIN_PIXELS;
static constexpr const char * VISION_KEY_VIDEO_MAX_PIXELS    = KEY_VIDEO_MAX_PIXELS;
static constexpr const char * VISION_KEY_PROJ_LAYER_NORM_EPS = KEY_PROJ_LAYER_NORM_EPS;

//
// tensor names
//

static constexpr const char * VISION_TENSOR_BOI = TN_TOK_BOI;
static constexpr const char * VISION_TENSOR_EOI = TN_TOK_EOI;
static constexpr const char * VISION_TENSOR_BOV = TN_TOK_BOV;
static constexpr const char * VISION_TENSOR_EOV = TN_TOK_EOV;

// suffix: weight or bias
static inline std::string vision_tensor_mm(int i, const char * suffix) {
    return string_format(TN_LLAVA_PROJ, i, suffix);
}

static inline std::string vision_tensor_mm_post_norm(const char * suffix) {
    return string_format(TN_MM_POST_NORM, suffix);
}
