#pragma once

// What ggml.c and ggml-quants.c must see of our types.

#include <assert.h>

#include "ggml.h"
#include "ggml-ccq.h"

// clang-format off
#define PYLLAMAERNIE_TYPE(NAME, lower, id, block_size, text) && (id) >= (int) GGML_TYPE_COUNT_UPSTREAM && (id) < (int) GGML_TYPE_COUNT
static_assert(1
#include "pyllamaernie-types.inc"
    , "upstream's types have reached the numbers of ours");
// clang-format on
