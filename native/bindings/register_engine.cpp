// Engine: upstream's server_context and server_routes inside this process, without HTTP.
//
// Requests and answers are the JSON of upstream's routes. The calling thread plays the part of an HTTP worker; the loop
// thread owns the context. No signal handler, no locale, no output. Source: llama.cpp tools/server/server.cpp at the pin.

#include "bindings.h"

#include "arg.h"
#include "common.h"
#include "mtmd-helper.h"
#include "server-context.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace py = pybind11;

// common_params_parse() prints to stderr, reads LLAMA_ARG_* and config files and may call exit(): a library must do none of
// that. The table of options, their names and their handlers are upstream's.
static void apply_arguments(const std::vector<std::string> & args, common_params & params) {
    common_params_context ctx = common_params_parser_init(params, LLAMA_EXAMPLE_SERVER, nullptr);

    std::map<std::string, std::pair<common_arg *, bool>> options;
    for (auto & option : ctx.options) {
        for (const auto & name : option.args) {
            options[name] = { &option, true };
        }
        for (const auto & name : option.args_neg) {
            options[name] = { &option, false };
        }
    }

    size_t     i          = 0;
    const auto next_value = [&](const std::string & name) {
        if (i >= args.size()) {
            throw std::invalid_argument("option " + name + " needs a value");
        }
        return args[i++];
    };
    while (i < args.size()) {
        const std::string name = args[i++];
        const auto        it   = options.find(name);
        if (it == options.end()) {
            throw std::invalid_argument("unknown engine option: " + name);
        }
        common_arg & option = *it->second.first;
        try {
            if (option.handler_void) {
                option.handler_void(params);
            } else if (option.handler_bool) {
                option.handler_bool(params, it->second.second);
            } else if (option.handler_int) {
                option.handler_int(params, std::stoi(next_value(name)));
            } else if (option.handler_string) {
                option.handler_string(params, next_value(name));
            } else if (option.handler_str_str) {
                const std::string first = next_value(name);
                option.handler_str_str(params, first, next_value(name));
            }
        } catch (const std::exception & e) {
            throw std::invalid_argument("engine option " + name + ": " + e.what());
        }
    }
}

// the part of common_params_parse() that completes what the options left open
static void complete_params(common_params & params) {
    postprocess_cpu_params(params.cpuparams, nullptr);
    postprocess_cpu_params(params.cpuparams_batch, &params.cpuparams);
    postprocess_cpu_params(params.speculative.draft.cpuparams, &params.cpuparams);
    postprocess_cpu_params(params.speculative.draft.cpuparams_batch, &params.cpuparams_batch);
    if (!params.kv_overrides.empty()) {
        params.kv_overrides.emplace_back();
        params.kv_overrides.back().key[0] = 0;
    }
    while (params.tensor_buft_overrides.size() < llama_max_tensor_buft_overrides()) {
        params.tensor_buft_overrides.push_back({ nullptr, nullptr });
    }
    if (!params.chat_template.empty() && !common_chat_verify_template(params.chat_template, params.use_jinja)) {
        throw std::invalid_argument("the chat template is not valid: it does not parse, or fails on a plain message");
    }
    if (!params.default_template_kwargs.count("preserve_reasoning")) {
        params.default_template_kwargs["preserve_reasoning"] = "true";
    }
}

class engine_stream;

class engine_core : public loaded_model {
public:
    explicit engine_core(const std::vector<std::string> & args) {
        static std::once_flag backend_once;
        std::call_once(backend_once, llama_backend_init);

        apply_arguments(args, params);
        complete_params(params);

        server = std::make_unique<server_context>();
        routes = std::make_unique<server_routes>(params, *server);
        if (!server->load_model(params)) {
            throw std::runtime_error("the engine could not load the model");
        }
        routes->update_meta(*server);
        model = const_cast<llama_model *>(llama_get_model(server->get_llama_context()));

        loop = std::thread([this]() {
            try {
                server->start_loop();
            } catch (const std::exception & e) {
                std::lock_guard<std::mutex> lock(mutex);
                failure = e.what();
            }
            loop_done = true;
        });
    }

    ~engine_core() override {
        close();
    }

    void close();

    bool is_stopped() const {
        return closing || loop_done;
    }

    std::string stop_reason() {
        std::lock_guard<std::mutex> lock(mutex);
        return failure.empty() ? "the engine is closed" : "the engine stopped: " + failure;
    }

    void session_opened() override {
        std::lock_guard<std::mutex> lock(mutex);
        if (model == nullptr || is_stopped()) {
            throw std::runtime_error("the engine is closed");
        }
        n_sessions++;
    }

    void session_closed() override {
        std::lock_guard<std::mutex> lock(mutex);
        n_sessions--;
    }

    server_http_context::handler_t & handler(const std::string & route) {
        static const std::map<std::string, server_http_context::handler_t server_routes::*> table = {
            { "chat/completions", &server_routes::post_chat_completions },
            // clang-format off
            { "completions",      &server_routes::post_completions      },
            { "apply-template",   &server_routes::post_apply_template   },
            { "tokenize",         &server_routes::post_tokenize         },
            { "detokenize",       &server_routes::post_detokenize       },
            { "props",            &server_routes::get_props             },
            // clang-format on
        };
        const auto it = table.find(route);
        if (it == table.end()) {
            throw std::invalid_argument("unknown route: " + route);
        }
        return (*routes).*(it->second);
    }

    common_params                   params;
    std::unique_ptr<server_context> server;
    std::unique_ptr<server_routes>  routes;

    std::mutex                                mutex;  // guards the three below
    std::vector<std::weak_ptr<engine_stream>> streams;
    int                                       n_sessions = 0;
    std::string                               failure;

private:
    std::thread       loop;
    std::mutex        close_mutex;
    std::atomic<bool> closing{ false };
    std::atomic<bool> loop_done{ false };
};

// One request and its answer, whole or piece by piece.
class engine_stream {
public:
    engine_stream(std::shared_ptr<engine_core> core, const std::string & route, const std::string & body) :
        core(std::move(core)), should_stop([this]() { return stop_requested(); }),
        req{ {}, {}, "/" + route, "", body, {}, should_stop } {}

    static std::shared_ptr<engine_stream> open(
        std::shared_ptr<engine_core> core, const std::string & route, const std::string & body) {
        auto                        stream = std::make_shared<engine_stream>(core, route, body);
        std::lock_guard<std::mutex> stream_lock(stream->mutex);
        {
            std::lock_guard<std::mutex> lock(core->mutex);
            auto &                      streams = core->streams;
            streams.erase(std::remove_if(streams.begin(), streams.end(), [](const auto & s) { return s.expired(); }),
                streams.end());
            streams.push_back(stream);
        }
        if (core->is_stopped()) {
            throw std::runtime_error(core->stop_reason());
        }
        stream->res = core->handler(route)(stream->req);
        stream->throw_interruption();
        if (!stream->res->is_stream()) {
            stream->status = stream->res->status;
            stream->data   = std::move(stream->res->data);
            stream->res.reset();
            if (stream->data.empty()) {
                throw std::runtime_error(core->stop_reason());
            }
        }
        return stream;
    }

    // The next piece of server-sent text, which may be empty; none at the end.
    std::optional<std::string> next() {
        std::lock_guard<std::mutex> lock(mutex);
        if (broken_off) {
            throw std::runtime_error(core->stop_reason());
        }
        if (!res) {
            return std::nullopt;
        }
        std::string text;
        if (!res->next(text)) {
            res.reset();
            throw_interruption();
            if (core->is_stopped()) {
                throw std::runtime_error(core->stop_reason());
            }
        }
        return text;
    }

    // Cancels what is still running.
    void finish(bool by_engine = false) {
        std::lock_guard<std::mutex> lock(mutex);
        broken_off = broken_off || (by_engine && res);
        res.reset();
    }

    int         status = 200;
    std::string data;

private:
    bool stop_requested() {
        if (core->is_stopped() || interruption) {
            return true;
        }
        // Ctrl-C arrives here: Python only marks the signal while native code runs
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) {
            interruption = std::make_exception_ptr(py::error_already_set());
        }
        return interruption != nullptr;
    }

    void throw_interruption() {
        if (interruption) {
            res.reset();
            std::rethrow_exception(interruption);
        }
    }

    std::shared_ptr<engine_core> core;
    std::function<bool()>        should_stop;
    server_http_req              req;  // refers to should_stop, and res refers to req: this order
    server_http_res_ptr          res;
    bool                         broken_off = false;  // the engine was closed before the answer ended
    std::mutex                   mutex;               // held while native code works on the request
    std::exception_ptr           interruption;
};

void engine_core::close() {
    std::lock_guard<std::mutex> close_lock(close_mutex);
    if (!server) {
        return;
    }
    std::vector<std::weak_ptr<engine_stream>> open_streams;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (n_sessions > 0) {
            throw std::runtime_error("close the sessions of this engine first");
        }
        closing = true;
        open_streams.swap(streams);
    }
    // an answer that is being read sees `closing` within a second; one that nobody reads any more is cancelled here
    for (auto & weak : open_streams) {
        if (auto stream = weak.lock()) {
            stream->finish(/*by_engine*/ true);
        }
    }
    // terminate() has no effect before the loop runs, so it is repeated until the loop has ended
    while (loop.joinable() && !loop_done) {
        server->terminate();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (loop.joinable()) {
        loop.join();
    }
    model = nullptr;
    routes.reset();
    server.reset();
}

void register_engine(py::module_ & m) {
    py::class_<engine_stream, std::shared_ptr<engine_stream>>(m, "Stream")
        .def_readonly("status", &engine_stream::status)
        .def_property_readonly("data", [](const engine_stream & self) { return py::bytes(self.data); })
        .def("next",
            [](engine_stream & self) -> py::object {
                std::optional<std::string> text;
                {
                    py::gil_scoped_release release;
                    text = self.next();
                }
                return text ? py::object(py::bytes(*text)) : py::object(py::none());
            })
        .def("close", [](engine_stream & self) { self.finish(); }, py::call_guard<py::gil_scoped_release>());

    py::class_<loaded_model, std::shared_ptr<loaded_model>>(m, "LoadedModel");

    py::class_<engine_core, loaded_model, std::shared_ptr<engine_core>>(m, "Engine")
        .def(py::init<const std::vector<std::string> &>(), py::arg("args"), py::call_guard<py::gil_scoped_release>())
        .def("open", &engine_stream::open, py::arg("route"), py::arg("body"), py::call_guard<py::gil_scoped_release>())
        .def("close", &engine_core::close, py::call_guard<py::gil_scoped_release>());
}
