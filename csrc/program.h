// A captured forward pass: a flat list of kernel calls over planned buffers, replayed in one call
// for any number of tokens.
//
// The time between two kernels of a small model must stay below a microsecond, which Python cannot
// do. So the list is recorded once (src/pellucid/backends/native/capture.py), with a mark where a
// barrier is needed. Only the replay is here.
//
// A buffer holds rows of `width` float32, or activations quantized to 8 bits (kernels.h,
// Quantized): all codes, then all scales, then the sums. Buffers lie in one arena. Their places are
// in bytes per token, so one plan serves every batch size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace pellucid {

// Bounds of every program and batch. Sums and products of sizes within them cannot overflow.
constexpr size_t kMostTokens = size_t{1} << 30;  // of a batch or a request: positions are int32
constexpr size_t kMostWidth = size_t{1} << 30;   // numbers of a row
constexpr size_t kMostBytesPerToken = size_t{1} << 40;

struct Weight {  // a matrix in tiles
    Format format;
    size_t outputs, inputs, bytes;
    std::shared_ptr<uint8_t> tiles;
    bool finite = true;  // whether no scale, minimum or plain number of it is NaN or infinite
    // The input at each place of a row, where the rows' inputs were sorted (GPTQ's act-order);
    // empty if they were not. Such a weight multiplies activations that were quantized in this
    // order.
    std::vector<int32_t> order{};
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

enum class RowsOf { Tokens, Logits, Hidden };  // one per token, per wanted logit, per hidden state

struct Buffer {
    size_t offset;  // bytes per token before it in the arena
    size_t width;   // elements
    bool quantized;
    RowsOf rows;
};

struct Entry {
    Op op;
    std::vector<int> in{};
    int out = -1;
    std::shared_ptr<Weight> weight{};
    std::vector<std::shared_ptr<Vector>> vectors{};
    std::shared_ptr<KVStore> kv{};
    bool barrier = false;  // something that this entry touches was touched in another share since
                           // the last barrier
    // The attributes of all ops; ops.inc lists those of each op.
#define ATTRIBUTE(type, name) type name{};
#include "ops.inc"
};

struct Batch {
    const int32_t *input_ids, *positions, *logits_indices, *hidden_indices, *cu_seqlens_q;
    const int32_t *seq_lens;
    const int32_t *block_tables;  // [groups, requests, table_width]
    const int32_t *slot_mapping;  // [groups, tokens]
    size_t tokens, logits, hidden, requests, table_width, groups;

    size_t count(RowsOf rows) const {
        return rows == RowsOf::Tokens ? tokens : rows == RowsOf::Logits ? logits : hidden;
    }
    // The tokens whose rows a TakeRows takes.
    const int32_t *indices_of(RowsOf rows) const {
        return rows == RowsOf::Logits ? logits_indices : hidden_indices;
    }
    const int32_t *block_tables_of(int group) const {
        return block_tables + static_cast<size_t>(group) * requests * table_width;
    }
    const int32_t *slots_of(int group) const {
        return slot_mapping + static_cast<size_t>(group) * tokens;
    }
    // The indices that an Embed looks up: token ids, or positions if those are learned.
    const int32_t *rows_of(const Entry &embed) const {
        return embed.learned ? positions : input_ids;
    }
};

struct Results {  // the caller's memory for what a run returns
    float *output, *hidden = nullptr;
};

class Program {
  public:
    // `output` and `hidden` are the buffers of the results; -1: the program has no hidden states.
    // Throws std::invalid_argument if a buffer does not lie in the arena, or if a result is not a
    // buffer of floats.
    Program(const Kernels *kernels, std::shared_ptr<ThreadPool> pool, std::vector<Buffer> buffers,
            size_t bytes_per_token, int output, int hidden = -1);

    // Throws std::invalid_argument if the parts of an entry do not fit together. An accepted entry
    // stays within its memory for every batch.
    void add(Entry entry);

    // Run the list; the buffers of the results lie in `out`. If an index of the batch is out of
    // range, throws std::out_of_range and runs nothing. With `seconds` (one per entry) the time of
    // each entry is added up. The times sum to the time of the run: a stage's time is divided among
    // its entries in proportion to their own times, so waiting at a barrier counts for the entries
    // before it.
    void run(const Batch &batch, Results out, double *seconds = nullptr);

    size_t size() const { return entries_.size(); }
    const Buffer &output() const { return buffers_[static_cast<size_t>(output_)]; }
    // The buffer of the hidden states, or null.
    const Buffer *hidden() const {
        return hidden_ < 0 ? nullptr : &buffers_[static_cast<size_t>(hidden_)];
    }

  private:
    struct Stage {  // entries between two barriers
        size_t first, last;
        bool merge;  // of the first, an attention that is divided by splits, only its second half
    };

    void check_buffers() const;  // these three: program_checks.cpp
    void check_entry(const Entry &entry) const;
    void check_batch(const Batch &batch) const;
    void make_room(const Batch &batch);
    void divide(const Batch &batch, Results out);
    size_t ticks_per_share() const;
    size_t tick_index(size_t stage, size_t share) const;
    void add_seconds(uint64_t start, uint64_t last_tick, double per_tick, double *seconds) const;
    AttentionArgs attention_args(const Entry &entry, const Batch &batch, Results out);
    void execute(size_t index, bool merge, const Batch &batch, Results out, size_t share);
    float *floats(int buffer, Results out) const;
    Quantized quantized(int buffer) const;
    const uint8_t *next_weights(size_t entry, size_t share) const;

    const Kernels *kernels_;
    std::shared_ptr<ThreadPool> pool_;
    std::vector<Buffer> buffers_;
    size_t bytes_per_token_;
    int output_, hidden_;  // the buffers of the results: they lie in the caller's memory
    std::vector<Entry> entries_;
    size_t capacity_ = 0;  // tokens the arena has room for
    size_t scratch_bytes_ = 0;
    Memory arena_;
    std::vector<Memory> scratch_;  // one per share
    std::vector<float> partials_;  // of attention that is divided by splits
    std::vector<Stage> stages_;    // of the run that is on
    std::vector<uint64_t> ticks_;  // of a run that is timed
};

}  // namespace pellucid
