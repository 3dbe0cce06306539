// The kernels: one table of functions per instruction set, all compiled from kernels/*.inc. One
// table is chosen when the program starts.
//
// A kernel computes a share of an op: row tiles first … last - 1, or tokens first … last - 1. No
// share depends on another. Threads divide the work by outputs, never by the inputs that are
// summed. Each output element is computed by one fixed sequence of operations. So a token's bits
// are the same alone and in a batch of five hundred.
//
// Letters: T tokens, K inputs, N outputs, H query heads, KH key/value heads, D head_dim. All sizes
// are elements unless said otherwise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kv_format.h"
#include "tile.h"

namespace pellucid {

// Activations in 8 bits: x ≈ scale · q in each block of 32 inputs, q in -127 … 127. The sums are of
// q; offsets and minima of weights are multiplied by them.
struct Quantized {
    int8_t *q;        // [T, K]
    float *scales;    // [T, K / 32]
    int32_t *sums32;  // [T, K / 32]
    int32_t *sums16;  // [T, K / 16]
};  // By rows (quantize_rows): scales and sums32 are [T], and sums16 is not used.

struct LinearArgs {
    Format format;
    const uint8_t *tiles;
    size_t outputs, inputs;
    const float *bias;  // [N] or null
    const float *x;     // [T, K]: what dense weights multiply
    Quantized a;        // what quantized weights multiply
    size_t tokens;
    float *y;             // [T, N]
    uint8_t *scratch;     // of this thread: scratch_bytes(inputs)
    const uint8_t *next;  // weights that this thread will read after these, or null: prefetched
                          // when these come to their end
};

// Memory for one decoded row tile: 16 · K bytes of codes, and up to 2 · 2 float32 for each row and
// 32 inputs.
constexpr size_t decoded_bytes(size_t inputs) {
    return inputs * kTileRows + inputs / kTileInputs * 4 * kTileRows * sizeof(float);
}

// The activations that a thread packs at once (kernels/linear_packed.inc): 32 tokens, which stay in
// L2, and for each token and block, beside its codes, up to 5 numbers of 4 bytes.
constexpr size_t kPackedTokens = 32, kMostPackedNumbers = 5;

// The scratch of a linear layer: a decoded row tile, then packed activations.
constexpr size_t scratch_bytes(size_t inputs) {
    const size_t packed = kTileInputs + kMostPackedNumbers * sizeof(int32_t);
    return decoded_bytes(inputs) + inputs / kTileInputs * kPackedTokens * packed + 64;
}

struct KvWriteArgs {
    const float *x;        // [T, KH, D]
    const int32_t *slots;  // [T]
    int kv_heads, head_dim;
    KvType type;
    bool keys;  // or values
    uint8_t *cache;
};

struct AttentionArgs {
    const float *q;        // [T, H, D]
    const uint8_t *k, *v;  // chunks of keys and values: kv_format.h
    KvType k_type, v_type;
    const int32_t *cu_seqlens_q, *seq_lens, *block_tables;  // [R + 1], [R], [R, table_width]
    size_t requests, table_width;
    int heads, kv_heads, head_dim, chunks_per_block;
    float scale, softcap;  // softcap 0: none
    int window;            // 0: none
    float *out;            // [T, H, D]
    float *partials;       // for attention_partials
};

// The ops of a program, numbered in the order of ops.inc.
enum class Op : int {
#define OP(Name, name, rows, ...) Name,
#include "ops.inc"
};

struct Kernels {
#define KERNEL(result, name, parameters) result(*name) parameters;
#include "ops.inc"
    // Request the additional registers that these kernels need, for the whole process; false if the
    // operating system refuses.
    bool (*request)() = nullptr;
};

// The kernels for one instruction set. All their code is compiled for the features in `needs`, and
// so is `table`: none of it may run before cpu_has(needs) has said that this CPU has them.
struct KernelSet {
    const char *name;
    const char *needs;  // as cpu_has takes them
    const Kernels *(*table)();
};

// The sets of this build, the best first (kernels/list.cpp). AMX comes after AVX-512, because whole
// models have not run on it yet. Each set is compiled only for its own architecture.
std::span<const KernelSet> kernel_sets();

const Kernels *kernels_avx512();
const Kernels *kernels_amx();
const Kernels *kernels_avx2();
const Kernels *kernels_neon();
const Kernels *kernels_portable();

}  // namespace pellucid
