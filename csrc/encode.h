// Encodes rows of float32 values into ggml's quantized blocks: the searches of
// src/pellucid/formats/search.py, which define the result bit for bit, several blocks at a time.
//
// Every sum runs in the order of the values and no product is fused with a sum, so all instruction
// sets give the same bytes. They are ggml's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace pellucid {

struct EncodeArgs {
    int ggml_type;
    size_t rows, columns;     // columns fill whole blocks
    const float *x;           // [rows, columns]
    const float *importance;  // [columns], or null
    uint8_t *out;             // the blocks of the rows, one after another
};

// The encoder for one instruction set. `encode` may only run where cpu_has(needs).
struct Encoder {
    const char *isa;
    const char *needs;
    // False if a value or a scale is beyond what the format holds; `out` is then undefined.
    bool (*encode)(const EncodeArgs &);
};

// Those that this CPU can run, the best first.
std::span<const Encoder> encoders();

// Values and bytes of a block; {0, 0} for a type that cannot be encoded here.
struct BlockSize {
    size_t values, bytes;
};
BlockSize encoded_block(int ggml_type);

}  // namespace pellucid
