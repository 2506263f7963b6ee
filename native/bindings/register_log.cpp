// Native log lines into a bounded queue that Python drains between calls.
//
// No compute thread takes the GIL and nothing reaches stdout or stderr. llama.h and mtmd.h have log callbacks; upstream's
// server code logs through common_log_add(), which has none and always prints. That code is linked statically into this
// module, so the two definitions at the end of this file stand in for libllama-common's, whose own log is paused.

#include "bindings.h"

#include "common.h"
#include "log.h"
#include "mtmd-helper.h"

#include <atomic>
#include <cstdarg>
#include <deque>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

namespace py = pybind11;

enum log_source : int {
    LOG_SOURCE_GGML   = 0,
    LOG_SOURCE_MTMD   = 1,
    LOG_SOURCE_ENGINE = 2,
};

struct log_line {
    int         source;
    int         level;
    std::string text;
};

static constexpr size_t LOG_LINES_MAX = 4096;

static std::mutex           g_log_mutex;
static std::deque<log_line> g_log_lines;
static size_t               g_log_n_dropped = 0;
static std::atomic<int>     g_log_level_min{ GGML_LOG_LEVEL_WARN };

static void log_push(int source, ggml_log_level level, const char * text) {
    // a CONT line belongs to the line before it, and NONE is plain output: both follow the INFO threshold
    const int rank = level == GGML_LOG_LEVEL_CONT || level == GGML_LOG_LEVEL_NONE ? GGML_LOG_LEVEL_INFO : level;
    if (rank < g_log_level_min.load(std::memory_order_relaxed)) {
        return;
    }
    std::lock_guard<std::mutex> lock(g_log_mutex);
    if (g_log_lines.size() >= LOG_LINES_MAX) {
        g_log_lines.pop_front();
        g_log_n_dropped++;
    }
    g_log_lines.push_back({ source, (int) level, text });
}

static void log_callback(ggml_log_level level, const char * text, void * user_data) {
    log_push((int) (intptr_t) user_data, level, text);
}

static void log_set_level(int level) {
    g_log_level_min = level;
    // common's own scale counts the other way: 1 error .. 5 debug
    // clang-format off
    common_log_set_verbosity_thold(
        level <= GGML_LOG_LEVEL_DEBUG ? LOG_LEVEL_DEBUG :
        level <= GGML_LOG_LEVEL_INFO  ? LOG_LEVEL_INFO  :
        level <= GGML_LOG_LEVEL_WARN  ? LOG_LEVEL_WARN  : LOG_LEVEL_ERROR);
    // clang-format on
}

static py::tuple log_drain() {
    std::deque<log_line> lines;
    size_t               n_dropped;
    {
        std::lock_guard<std::mutex> lock(g_log_mutex);
        lines.swap(g_log_lines);
        n_dropped       = g_log_n_dropped;
        g_log_n_dropped = 0;
    }
    py::list res;
    for (const auto & line : lines) {
        PyObject * text = PyUnicode_DecodeUTF8(line.text.data(), (Py_ssize_t) line.text.size(), "replace");
        res.append(py::make_tuple(line.source, line.level, py::reinterpret_steal<py::str>(text)));
    }
    return py::make_tuple(res, n_dropped);
}

void register_log(py::module_ & m) {
    common_log_pause(common_log_main());
    llama_log_set(log_callback, (void *) (intptr_t) LOG_SOURCE_GGML);
    mtmd_helper_log_set(log_callback, (void *) (intptr_t) LOG_SOURCE_MTMD);
    log_set_level(GGML_LOG_LEVEL_WARN);

    m.def("log_set_level", &log_set_level, py::arg("level"));
    m.def("log_drain", &log_drain);
}

//
// stand-ins, see the top of the file
//

void common_log_add(struct common_log * /*log*/, enum ggml_log_level level, const char * fmt, ...) {
    va_list args;
    va_list args_copy;
    va_start(args, fmt);
    va_copy(args_copy, args);
    const int n = vsnprintf(nullptr, 0, fmt, args);
    va_end(args);
    if (n >= 0) {
        std::string text((size_t) n + 1, '\0');
        vsnprintf(&text[0], text.size(), fmt, args_copy);
        text.resize((size_t) n);
        log_push(LOG_SOURCE_ENGINE, level, text.c_str());
    }
    va_end(args_copy);
}

// the server hands this one to mtmd when it loads a projector
void common_log_default_callback(enum ggml_log_level level, const char * text, void * /*user_data*/) {
    log_push(LOG_SOURCE_MTMD, level, text);
}
