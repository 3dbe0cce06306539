// The layout of keys and values in the cache: chunks of 16 tokens of one KV head. Keys and values
// each have one of four types.
//
// - Keys are codes [D][16]: a vector is one dimension of 16 tokens, so that scores need no sums
//   across lanes.
// - Values are codes [16][D]: a vector is 16 dimensions of one token.
//
// Codes of 8 and 4 bits are followed by their scales, float16 [groups][16]: one group of all
// dimensions in 8 bits, groups of 32 in 4. The two 4-bit codes of a byte belong to one token, and
// to dimensions that lie 16 apart. So two tokens never share a byte, and a byte vector unpacks to
// whole vectors of either half. Per group of 32: keys [16][16 tokens], values [16 tokens][16],
// first halves in the low nibbles, second halves in the high ones.
//
// - int8: x ≈ scale · code, scale = max |x| / 127.
// - int4: x ≈ scale · (code - 8), scale = (the x of the largest |x|) / -8. Keys are first rotated
//   by a Hadamard matrix, which spreads the few large dimensions over all. Queries are rotated too
//   (QuaRot, Ashkboos et al., arXiv:2404.00456).
//
// A scale is NaN if float16 cannot hold it, or if its vector has a NaN.
//
// src/pellucid/backends/reference/kv_dtypes.py defines the types, and computes the same codes and
// scales bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pellucid {

constexpr int kChunk = 16;    // tokens; a KV block is one or more chunks
constexpr int kKvGroup = 32;  // dimensions that share a scale in 4 bits
constexpr int kMostHeadDim = 1024;
constexpr int kMostKvHeads = 1 << 16;
constexpr int kMostChunks = 1 << 16;                  // of a block
constexpr size_t kMostSlots = (size_t{1} << 31) - 1;  // of a cache: a slot is an int32

enum class KvType : int { F32, F16, Int8, Int4 };

struct KvTypeName {
    KvType type;
    const char *name;
};
constexpr KvTypeName kKvTypes[] = {// the default first: it has no measurable loss
                                   {KvType::F16, "f16"},
                                   {KvType::F32, "f32"},
                                   {KvType::Int8, "int8"},
                                   {KvType::Int4, "int4"}};

// The number of scales of one token and head; 0 if it is not quantized.
constexpr int kv_groups(KvType type, int head_dim) {
    return type == KvType::Int8 ? 1 : type == KvType::Int4 ? head_dim / kKvGroup : 0;
}

// Bytes of a chunk's codes, and of the whole chunk, for one head.
constexpr size_t kv_code_bytes(KvType type, int head_dim) {
    const size_t bits = type == KvType::F32    ? 32
                        : type == KvType::F16  ? 16
                        : type == KvType::Int8 ? 8
                                               : 4;
    return static_cast<size_t>(head_dim) * kChunk * bits / 8;
}
constexpr size_t kv_chunk_bytes(KvType type, int head_dim) {
    return kv_code_bytes(type, head_dim) +
           static_cast<size_t>(kv_groups(type, head_dim)) * kChunk * sizeof(uint16_t);
}

}  // namespace pellucid
