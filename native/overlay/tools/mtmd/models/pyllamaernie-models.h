#pragma once

// Graphs of the projector types in pyllamaernie-projectors.inc, and what the loader of projectors reads for them.

#include "../pyllamaernie-vision.h"

struct ernie4_5_vl_graph : vision_graph {
    ernie4_5_vl_graph(vision_ctx * ctx, const vision_image_f32 & img) : vision_graph(ctx, img) {}
    ggml_cgraph * build() override;

private:
    ggml_tensor * build_patches();
    ggml_tensor * build_resampler(ggml_tensor * frames);
};

bool ernie4_5_vl_encode_video(
    vision_ctx * ctx, int n_threads, const vision_image_batch & frames, std::vector<float> & out_embd);

template <typename loader>
static void ernie4_5_vl_load_hparams(loader & ml, vision_hparams & hparams) {
    ml.get_u32(VISION_KEY_SPATIAL_MERGE_SIZE, hparams.n_merge);
    ml.get_u32(VISION_KEY_IMAGE_MIN_PIXELS, hparams.image_min_pixels);
    ml.get_u32(VISION_KEY_IMAGE_MAX_PIXELS, hparams.image_max_pixels);
    ml.get_u32(
        VISION_KEY_VIDEO_MIN_PIXELS, hparams.video_min_pixels, false);  // a vocabulary may have no markers of videos
    ml.get_u32(VISION_KEY_VIDEO_MAX_PIXELS, hparams.video_max_pixels, false);
    ml.get_f32(VISION_KEY_PROJ_LAYER_NORM_EPS, hparams.proj_eps);

    hparams.image_resize_algo = VISION_RESIZE_BICUBIC;
    hparams.image_resize_pad  = VISION_PAD_NONE;  // stretched

    hparams.set_warmup_n_tokens(28 * 28);  // the largest picture would not fit into memory
}

template <typename getter>
static void ernie4_5_vl_load_tensors(getter get_tensor, vision_model & model) {
    // spatial stage: linear, linear, norm
    model.mm_0_w = get_tensor(vision_tensor_mm(0, "weight"));
    model.mm_0_b = get_tensor(vision_tensor_mm(0, "bias"));
    model.mm_1_w = get_tensor(vision_tensor_mm(1, "weight"));
    model.mm_1_b = get_tensor(vision_tensor_mm(1, "bias"));
    model.mm_2_w = get_tensor(vision_tensor_mm(2, "weight"));
    model.mm_2_b = get_tensor(vision_tensor_mm(2, "bias"));

    // temporal stage: linear, linear, norm
    model.mm_3_w = get_tensor(vision_tensor_mm(3, "weight"));
    model.mm_3_b = get_tensor(vision_tensor_mm(3, "bias"));
    model.mm_4_w = get_tensor(vision_tensor_mm(4, "weight"));
    model.mm_4_b = get_tensor(vision_tensor_mm(4, "bias"));
    model.mm_5_w = get_tensor(vision_tensor_mm(5, "weight"));
    model.mm_5_b = get_tensor(vision_tensor_mm(5, "bias"));

    // to the width of the language model
    model.mm_6_w         = get_tensor(vision_tensor_mm(6, "weight"));
    model.mm_6_b         = get_tensor(vision_tensor_mm(6, "bias"));
    model.mm_post_norm_w = get_tensor(vision_tensor_mm_post_norm("weight"));

    model.mm_boi = get_tensor(VISION_TENSOR_BOI);
    model.mm_eoi = get_tensor(VISION_TENSOR_EOI);
    if (model.hparams.video_max_pixels > 0) {
        model.mm_bov = get_tensor(VISION_TENSOR_BOV);
        model.mm_eov = get_tensor(VISION_TENSOR_EOV);
    }
}
