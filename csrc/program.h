// A captured forward pass: a flat list of kernel calls over planned buffers, with the number of
// tokens left open, replayed in one call.
//
// One idea: between two kernels of a small model there is less than a microsecond of work worth
// doing, and none of it is Python's. The list is made once
// (src/pellucid/backends/native/capture.py) and says where a barrier is needed; here it is only
// run.
//
// A buffer is rows of `width` float32, or activations quantized to 8 bits (kernels.h, Quantized),
// which lie otherwise: all codes, then all scales, then the sums. Buffers lie in one arena, in
// units of bytes per token: so one plan serves every batch size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace pellucid {

// Bounds of every program and batch. Sizes within them cannot overflow.
constexpr size_t kMostTokens = size_t{1} << 30;  // of a batch or a request: positions are int32
constexpr size_t kMostWidth = size_t{1} << 30;   // numbers of a row
constexpr size_t kMostBytesPerToken = size_t{1} << 40;

struct Weight {  // a matrix in tiles
    Format format;
    size_t outputs, inputs, bytes;
    std::shared_ptr<uint8_t> tiles;
    bool finite = true;  // whether no scale, minimum or plain number of it is NaN or infinite
};

struct Vector {  // a norm's weight, a bias, rotary frequencies
    std::vector<float> values;
};

struct KVStore {  // keys and values of a layer, or of several whose groups own different blocks
    size_t chunks;
    int kv_heads, head_dim, chunks_per_block;
    KvType k_type, v_type;
    Memory k, v;
};

enum class Op : int {
    Embed,       // out = rows of weight at input_ids (i[0] = 0) or at positions (1), times f[0]
    Quantize,    // out (quantized) = in[0]
    Linear,      // out = in[0] · weightᵀ + vector[0]
    RmsNorm,     // out = norm(in[0]) · vector[0], eps f[0], over rows of i[0]
    LayerNorm,   // the same with vector[1] added
    Add,         // out = in[0] + in[1]
    SiluMul,     // out = silu(in[0]) · in[1]
    GeluMul,     // out = gelu(in[0]) · in[1], or gelu(in[0]) alone
    Softcap,     // out = f[0] · tanh(in[0] / f[0])
    RopeAngles,  // out = cosines, then sines, of positions times f[1 …], times f[0]
    Rope,        // out = in[0] turned by the angles in[1]; i = heads, head_dim
    KvWrite,     // store in[0], in[1] in the cache; i = group
    Attention,   // out = attention of in[0]; i = heads, head_dim, window, group; f = scale, softcap
    TakeRows,    // out = rows of in[0] at logits_indices
};

struct Buffer {
    size_t offset;  // bytes per token before it in the arena
    size_t width;   // elements
    bool quantized;
    bool logits_rows;  // one row per wanted logit, not per token
};

struct Entry {
    Op op;
    std::vector<int> in;
    int out;
    std::shared_ptr<Weight> weight;
    std::vector<std::shared_ptr<Vector>> vectors;
    std::shared_ptr<KVStore> kv;
    std::vector<int> ints;
    std::vector<double> floats;
    bool barrier;  // something that this entry touches was touched in another share since the last
                   // barrier
};

struct Batch {
    const int32_t *input_ids, *positions, *logits_indices, *cu_seqlens_q, *seq_lens;
    const int32_t *block_tables;  // [groups, requests, table_width]
    const int32_t *slot_mapping;  // [groups, tokens]
    size_t tokens, logits, requests, table_width, groups;

    const int32_t *block_tables_of(int group) const {
        return block_tables + static_cast<size_t>(group) * requests * table_width;
    }
    const int32_t *slots_of(int group) const {
        return slot_mapping + static_cast<size_t>(group) * tokens;
    }
    // The rows that an Embed looks up: tokens, or positions where they are learned.
    const int32_t *rows_of(const Entry &embed) const {
        return embed.ints[0] ? positions : input_ids;
    }
};

class Program {
  public:
    // Throws std::invalid_argument where a buffer does not lie in the arena, or the output is not a
    // buffer of floats.
    Program(const Kernels *kernels, std::shared_ptr<ThreadPool> pool, std::vector<Buffer> buffers,
            size_t bytes_per_token, int output);

    // Throws std::invalid_argument where the parts of an entry do not fit together: no batch can
    // lead it outside its memory.
    void add(Entry entry);

    // Run the list; the output buffer is `out`. Throws std::out_of_range, having run nothing, where
    // an index of the batch is. With `seconds` (one per entry) a barrier follows each entry, and
    // its time is added up.
    void run(const Batch &batch, float *out, double *seconds = nullptr);

    size_t size() const { return entries_.size(); }
    const Buffer &output() const { return buffers_[static_cast<size_t>(output_)]; }

  private:
    struct Stage {  // entries between two barriers
        size_t first, last;
        bool merge;  // of the first, an attention that is divided by splits, only its second half
    };

    void check_buffers() const;  // these three: program_checks.cpp
    void check_entry(const Entry &entry) const;
    void check_batch(const Batch &batch) const;
    void make_room(const Batch &batch);
    void divide(const Batch &batch, float *out, bool every_entry);
    AttentionArgs attention_args(const Entry &entry, const Batch &batch, float *out);
    void execute(size_t index, bool merge, const Batch &batch, float *out, size_t share);
    float *floats(int buffer, float *out) const;
    Quantized quantized(int buffer) const;
    const uint8_t *next_weights(size_t entry, size_t share) const;

    const Kernels *kernels_;
    std::shared_ptr<ThreadPool> pool_;
    std::vector<Buffer> buffers_;
    size_t bytes_per_token_;
    int output_;  // the buffer that is the result: it lies in the caller's memory
    std::vector<Entry> entries_;
    size_t capacity_ = 0;  // tokens the arena has room for
    size_t scratch_bytes_ = 0;
    Memory arena_;
    std::vector<Memory> scratch_;  // one per share
    std::vector<float> partials_;  // of attention that is divided by splits
    std::vector<Stage> stages_;    // of the run that is on
};

}  // namespace pellucid
