#pragma once

// Whole videos for projectors that take one as a single chunk. A video is a bitmap whose frames lie one below the other.

#include "mtmd.h"

// Shapes: data is (n_frames, ny, nx, 3), or null for a placeholder
MTMD_API mtmd_bitmap * mtmd_bitmap_init_video(uint32_t nx, uint32_t ny, uint32_t n_frames, const unsigned char * data);

MTMD_API bool mtmd_takes_whole_videos(const mtmd_context * ctx);

// pixels of a frame
MTMD_API void mtmd_get_video_limits(const mtmd_context * ctx, int32_t * min_pixels, int32_t * max_pixels);

// The normalized pixels of a picture or of one frame of a video, null when there are none.
// Shapes: (ny, nx, 3)
MTMD_API const float * mtmd_input_chunk_get_pixels(
    const mtmd_input_chunk * chunk, size_t i_frame, int32_t * nx, int32_t * ny);

// A video from frames in pyllamaernie.media's container or, through that module as a program, from any video file.
// Returns null, with the reason in the log, for anything else.
mtmd_bitmap * mtmd_helper_video_bitmap(
    const mtmd_context * ctx, const unsigned char * buf, size_t len, bool placeholder, const char * id);
