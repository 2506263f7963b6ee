// ERNIE 4.5 VL: ViT with 2-D rotary positions (no class token, no learned positions), then the variable resolution
// resampler: 2x2 patches -> spatial stage per frame -> temporal stage per pair of frames -> width of the language model.
// A still image is a pair of the same frame. The embeddings of START and END, an image's or a video's, belong to the
// output, because the language model routes them to its vision experts.

#include "models.h"

// -> [n_embd, n_patches, n_batch]
ggml_tensor * ernie4_5_vl_graph::build_patches() {
    // one linear layer over 3*patch_size*patch_size values; ggml_conv_2d would round pixels and weights to F16
    ggml_tensor * kernel = model.patch_embeddings_0;
    ggml_tensor * patches =
        ggml_im2col(ctx0, kernel, build_inp_raw(), patch_size, patch_size, 0, 0, 1, 1, true, GGML_TYPE_F32);
    patches = ggml_reshape_3d(ctx0, patches, patches->ne[0], n_patches, n_batch);

    return build_mm(ggml_reshape_2d(ctx0, kernel, patches->ne[0], n_embd), patches);
}

// frames: [n_embd, n_patches, n_batch] with n_batch 1 (an image) or 2 (a pair of video frames)
ggml_tensor * ernie4_5_vl_graph::build_resampler(ggml_tensor * frames) {
    auto build_stage = [&](ggml_tensor * cur, ggml_tensor * w0, ggml_tensor * b0, ggml_tensor * w1, ggml_tensor * b1,
                           ggml_tensor * norm_w, ggml_tensor * norm_b) {
        cur = build_ffn(cur, w0, b0, nullptr, nullptr, w1, b1, VISION_FFN_GELU_ERF, -1);
        return build_norm(cur, norm_w, norm_b, VISION_NORM_LAYER, eps, -1);
    };

    auto build_spatial = [&](int i) {
        ggml_tensor * cur = ggml_view_2d(ctx0, frames, n_embd, n_patches, frames->nb[1], i * frames->nb[2]);
        cur               = build_patch_merge_permute(cur, hparams.n_merge);
        cur = build_stage(cur, model.mm_0_w, model.mm_0_b, model.mm_1_w, model.mm_1_b, model.mm_2_w, model.mm_2_b);
        cb(cur, "spatial_out", i);
        return cur;
    };

    ggml_tensor * first  = build_spatial(0);
    ggml_tensor * second = n_batch > 1 ? build_spatial(1) : first;

    ggml_tensor * cur = ggml_concat(ctx0, first, second, 0);
    cur = build_stage(cur, model.mm_3_w, model.mm_3_b, model.mm_4_w, model.mm_4_b, model.mm_5_w, model.mm_5_b);
    cb(cur, "temporal_out", -1);

    cur = ggml_add(ctx0, build_mm(model.mm_6_w, cur), model.mm_6_b);
    return build_norm(cur, model.mm_post_norm_w, nullptr, VISION_NORM_RMS, hparams.proj_eps, -1);
}

ggml_cgraph * ernie4_5_vl_graph::build() {
    GGML_ASSERT(n_batch == 1 || n_batch == 2);

    ggml_tensor * positions = ggml_new_tensor_1d(ctx0, GGML_TYPE_I32, n_patches * 4);
    ggml_set_name(positions, "positions");
    ggml_set_input(positions);

    int sections[4] = { d_head / 4, d_head / 4, d_head / 4, d_head / 4 };

    auto add_pos = [&](ggml_tensor * cur, const vision_layer &) {
        return ggml_rope_multi(ctx0, cur, positions, nullptr, d_head / 2, sections, GGML_ROPE_TYPE_VISION, 0, 10000.0f,
            1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    };

    // attention stays within a frame: frames are the batch dimension
    ggml_tensor * cur = build_vit(build_patches(), n_patches, VISION_NORM_LAYER, hparams.ffn_op, nullptr, add_pos);
    cb(cur, "vit_out", -1);

    cur = build_resampler(cur);
    cb(cur, "resampler_out", -1);

    ggml_tensor * start = n_batch > 1 ? model.mm_bov : model.mm_boi;
    ggml_tensor * end   = n_batch > 1 ? model.mm_eov : model.mm_eoi;

    cur = ggml_concat(ctx0, ggml_reshape_2d(ctx0, start, cur->ne[0], 1), cur, 1);
    cur = ggml_concat(ctx0, cur, ggml_reshape_2d(ctx0, end, cur->ne[0], 1), 1);

    ggml_build_forward_expand(gf, cur);

    return gf;
}

// The frames of a video, a pair at a time; of each pair's START and END only the outermost are kept.
bool ernie4_5_vl_encode_video(
    vision_ctx * ctx, int n_threads, const vision_image_batch & frames, std::vector<float> & out_embd) {
    const size_t n_frames = frames.entries.size();
    const size_t n_embd   = (size_t) vision_n_embd_out(ctx);
    const size_t n_rows   = (size_t) vision_n_tokens_out(ctx, &frames.entries[0]);  // with START and END

    std::vector<float> pair_embd(n_rows * n_embd);
    std::vector<float> res;
    res.reserve(((n_rows - 2) * ((n_frames + 1) / 2) + 2) * n_embd);

    for (size_t i = 0; i < n_frames; i += 2) {
        vision_image_batch pair;
        pair.entries.push_back(frames.entries[i]);
        pair.entries.push_back(frames.entries[std::min(i + 1, n_frames - 1)]);
        if (!vision_encode(ctx, n_threads, &pair, pair_embd)) {
            return false;
        }
        const size_t first = i == 0 ? 0 : 1;
        const size_t last  = i + 2 >= n_frames ? n_rows : n_rows - 1;
        res.insert(res.end(), pair_embd.begin() + first * n_embd, pair_embd.begin() + last * n_embd);
    }
    out_embd = std::move(res);

    return true;
}
