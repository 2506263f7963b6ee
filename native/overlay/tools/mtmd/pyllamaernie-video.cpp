// Video files into frames. Which frames, their size and the time written into them are decided in one place, the Python
// module pyllamaernie.media; programs run it as `$PYLLAMAERNIE_PYTHON -m pyllamaernie.media FILE`, which the launchers set.

#include "pyllamaernie-video.h"

#include "mtmd-helper.h"
#include "mtmd-helper-common.h"
#include "sheredom/subprocess.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

namespace {

// magic, version, n_frames, width, height (little endian), then the frames' RGB rows
constexpr char   FRAMES_MAGIC[]  = "ERNIEVID";
constexpr size_t FRAMES_N_HEADER = 8 + 4 * sizeof(uint32_t);

uint32_t read_u32(const unsigned char * p) {
    return uint32_t(p[0]) | uint32_t(p[1]) << 8 | uint32_t(p[2]) << 16 | uint32_t(p[3]) << 24;
}

bool is_frames(const unsigned char * buf, size_t len) {
    return len >= FRAMES_N_HEADER && memcmp(buf, FRAMES_MAGIC, 8) == 0;
}

mtmd_bitmap * parse_frames(const unsigned char * buf, size_t len, bool placeholder) {
    const uint32_t version  = read_u32(buf + 8);
    const uint32_t n_frames = read_u32(buf + 12);
    const uint32_t nx       = read_u32(buf + 16);
    const uint32_t ny       = read_u32(buf + 20);

    // the sides are bounded first, so that their product cannot wrap around
    const bool sound =
        version == 1 && n_frames > 0 && nx > 0 && ny > 0 && n_frames <= 1 << 16 && nx <= 1 << 16 && ny <= 1 << 16;
    if (!sound || len - FRAMES_N_HEADER != size_t(nx) * ny * n_frames * 3) {
        LOG_ERR("%s: %zu bytes cannot be %u frames of %ux%u (version %u)\n", __func__, len, n_frames, nx, ny, version);
        return nullptr;
    }
    return mtmd_bitmap_init_video(nx, ny, n_frames, placeholder ? nullptr : buf + FRAMES_N_HEADER);
}

struct temporary_file {
    std::filesystem::path path;

    explicit temporary_file(const unsigned char * buf, size_t len) {
        std::random_device random;
        const uint64_t     number = uint64_t(random()) << 32 | random();
        path        = std::filesystem::temp_directory_path() / ("pyllamaernie-video-" + std::to_string(number));
        FILE * file = fopen(path.string().c_str(), "wbx");  // never a file that somebody else put there
        if (!file || fwrite(buf, 1, len, file) != len) {
            LOG_ERR("%s: the video could not be written to %s\n", __func__, path.string().c_str());
            path.clear();
        }
        if (file) {
            fclose(file);
        }
    }

    ~temporary_file() {
        std::error_code ignored;
        std::filesystem::remove(path, ignored);
    }
};

std::vector<unsigned char> decode(const unsigned char * buf, size_t len, int32_t min_pixels, int32_t max_pixels) {
    const char * python = getenv("PYLLAMAERNIE_PYTHON");
    if (python == nullptr || python[0] == '\0') {
        LOG_ERR("%s: videos are decoded by the Python package, and PYLLAMAERNIE_PYTHON does not name its Python; "
                "start this program by `pyllamaernie tool` or `pyllamaernie serve`\n",
            __func__);
        return {};
    }
    temporary_file file(buf, len);
    if (file.path.empty()) {
        return {};
    }
    const std::string path      = file.path.string();
    const std::string low       = std::to_string(min_pixels);
    const std::string high      = std::to_string(max_pixels);
    const char *      command[] = { python, "-P", "-m", "pyllamaernie.media", path.c_str(), "--min-pixels", low.c_str(),
        "--max-pixels", high.c_str(), nullptr };

    struct subprocess_s proc;
    if (subprocess_create(command, subprocess_option_inherit_environment | subprocess_option_no_window, &proc) != 0) {
        LOG_ERR("%s: %s could not be started\n", __func__, python);
        return {};
    }
    std::vector<unsigned char> res;
    std::vector<unsigned char> piece(1 << 20);
    while (const size_t n = fread(piece.data(), 1, piece.size(), subprocess_stdout(&proc))) {
        res.insert(res.end(), piece.begin(), piece.begin() + n);
    }
    std::string reason;
    char        line[512];
    while (fgets(line, sizeof(line), subprocess_stderr(&proc))) {
        reason += line;
    }
    int code = 1;
    subprocess_join(&proc, &code);
    subprocess_destroy(&proc);
    if (code != 0) {
        LOG_ERR("%s: the video could not be decoded: %s\n", __func__, reason.c_str());
        return {};
    }
    return res;
}

}  // namespace

mtmd_bitmap * mtmd_helper_video_bitmap(
    const mtmd_context * ctx, const unsigned char * buf, size_t len, bool placeholder, const char * id) {
    int32_t min_pixels, max_pixels;
    mtmd_get_video_limits(ctx, &min_pixels, &max_pixels);
    if (max_pixels <= 0) {
        LOG_ERR("%s: this model takes no videos, and the data is no picture that can be read\n", __func__);
        return nullptr;
    }

    mtmd_bitmap * res = nullptr;
    if (is_frames(buf, len)) {
        res = parse_frames(buf, len, placeholder);
    } else {
        const auto frames = decode(buf, len, min_pixels, max_pixels);
        if (is_frames(frames.data(), frames.size())) {
            res = parse_frames(frames.data(), frames.size(), placeholder);
        }
    }
    if (res) {
        mtmd_bitmap_set_id(res, id);
    }
    return res;
}
