// Checks of a program's buffers and entries when it is built, and of a batch's indices before each
// run.
//
// Kernels do not check their arguments. So every size that a kernel derives from an entry is
// compared here with the buffers, weights and caches that the entry names. A wrong program or batch
// causes an exception, never a read beyond an array.
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>

#include "program.h"

namespace pellucid {
namespace {

size_t bytes_per_token(const Buffer &b) {
    if (!b.quantized) return b.width * sizeof(float);
    return b.width + b.width / kTileInputs * 4 *
                         sizeof(float);  // Quantized: codes, a scale and a sum, and two sums of 16
}

void require_below(const int32_t *values, size_t count, size_t limit, const char *what) {
    for (size_t i = 0; i < count; i++)
        if (values[i] < 0 || static_cast<size_t>(values[i]) >= limit)
            throw std::out_of_range(std::string(what) + " " + std::to_string(values[i]) +
                                    " is not below " + std::to_string(limit));
}

}  // namespace

void Program::check_buffers() const {
    const auto require = [](bool good, const char *what) {
        if (!good) throw std::invalid_argument(what);
    };
    require(kernels_ != nullptr && pool_ != nullptr, "a program needs kernels and a pool");
    require(output_ >= 0 && static_cast<size_t>(output_) < buffers_.size(),
            "the output is not a buffer");
    require(!output().quantized, "the output is not of floats");
    require(hidden_ >= -1 && (hidden_ < 0 || static_cast<size_t>(hidden_) < buffers_.size()),
            "the hidden states are not a buffer");
    require(hidden_ != output_ && (hidden_ < 0 || !hidden()->quantized),
            "the hidden states are not of floats, or are the output");
    require(bytes_per_token_ <= kMostBytesPerToken, "a token takes too many bytes");
    for (const Buffer &b : buffers_) {
        require(b.width > 0 && b.width <= kMostWidth, "a buffer has no width, or too much");
        require(!b.quantized || b.width % kTileInputs == 0,
                "a quantized buffer is not a whole number of blocks");
        if (&b == &output() || &b == hidden()) continue;  // they lie in the caller's memory
        require(b.offset % sizeof(float) == 0, "a buffer is not aligned");
        require(b.offset <= bytes_per_token_ &&
                    pellucid::bytes_per_token(b) <= bytes_per_token_ - b.offset,
                "a buffer reaches beyond the arena");
    }
}

void Program::check_entry(const Entry &e) const {
    const auto require = [&](bool good, const char *what) {
        if (!good)
            throw std::invalid_argument("entry " + std::to_string(entries_.size()) + ": " + what);
    };
    const auto is_buffer = [&](int i) {
        return i >= 0 && static_cast<size_t>(i) < buffers_.size();
    };
    for (int i : e.in) require(is_buffer(i), "an input is not a buffer");
    require(e.op == Op::KvWrite ? e.out == -1 : is_buffer(e.out), "the output is not a buffer");
    const auto buffer = [&](int i) -> const Buffer & { return buffers_[static_cast<size_t>(i)]; };
    const auto takes = [&](size_t inputs) {
        require(e.in.size() == inputs, "the wrong number of inputs");
    };
    const auto has_vectors = [&](size_t count, size_t size) {
        require(e.vectors.size() == count, "the wrong number of vectors");
        for (const auto &v : e.vectors)
            require(v != nullptr && v->values.size() == size, "a vector has the wrong size");
    };
    if (e.op != Op::Linear && e.op != Op::RmsNorm && e.op != Op::LayerNorm) has_vectors(0, 0);
    // Most ops read and write floats of the same rows; in Quantize and Linear one side is
    // quantized.
    for (int i : e.in) {
        require(e.op == Op::Linear || !buffer(i).quantized, "an input is quantized");
        require(e.op == Op::KvWrite || e.op == Op::TakeRows || buffer(i).rows == buffer(e.out).rows,
                "an input has other rows than the output");
    }
    if (e.op != Op::KvWrite)
        require(buffer(e.out).quantized == (e.op == Op::Quantize || e.op == Op::QuantizeRows),
                "the output should be quantized, or should not");
    const size_t width = e.op == Op::KvWrite ? 0 : buffer(e.out).width;
    const auto as_wide_as_output = [&] {
        for (int i : e.in)
            require(buffer(i).width == width, "an input is not as wide as the output");
    };
    const bool of_tokens = e.op == Op::KvWrite || buffer(e.out).rows == RowsOf::Tokens;
    const auto heads_of = [&](int heads, int head_dim) {
        require(heads > 0 && head_dim > 0, "a number of heads, or their size, is not positive");
        return static_cast<size_t>(heads) * static_cast<size_t>(head_dim);
    };

    switch (e.op) {
        case Op::Embed:
            takes(0);
            require(of_tokens && e.weight != nullptr && e.weight->inputs == width,
                    "the table does not fit the output");
            require(e.weight->order.empty(), "the inputs of the table are in another order");
            break;
        case Op::Quantize:
            takes(1);
            as_wide_as_output();
            require(e.weight == nullptr || e.weight->order.size() == width,
                    "the order of the weight does not fit the input");
            break;
        case Op::QuantizeRows:
            takes(1);
            as_wide_as_output();
            break;
        case Op::Linear: {
            takes(1);
            require(e.weight != nullptr && e.weight->outputs == width,
                    "the weight does not fit the output");
            const Buffer &in = buffer(e.in[0]);
            require(in.width == e.weight->inputs &&
                        in.quantized == (dense_bytes(e.weight->format) == 0),
                    "the weight does not fit the input");
            has_vectors(e.vectors.empty() ? 0 : 1, width);
            break;
        }
        case Op::RmsNorm:
        case Op::LayerNorm:
            takes(1);
            as_wide_as_output();
            require(e.width > 0 && width % static_cast<size_t>(e.width) == 0,
                    "the width of the norm does not divide that of its input");
            has_vectors(e.op == Op::RmsNorm ? 1 : 2, static_cast<size_t>(e.width));
            break;
#define ELEMENTWISE(Name, name, inputs) \
    case Op::Name:                      \
        takes(inputs);                  \
        as_wide_as_output();            \
        break;
#include "ops.inc"
        case Op::Softcap:
            takes(1);
            as_wide_as_output();
            break;
        case Op::RopeAngles:
            takes(0);
            require(of_tokens && width == 2 * e.inv_freq.size(),
                    "cosines and sines are not as many as frequencies");
            break;
        case Op::Rope: {
            takes(2);
            const size_t turned = buffer(e.in[1]).width;
            require(of_tokens && buffer(e.in[0]).width == width &&
                        heads_of(e.heads, e.head_dim) == width,
                    "the heads do not fit");
            require(turned % 2 == 0 && turned <= static_cast<size_t>(e.head_dim),
                    "there are more angles than dimensions");
            break;
        }
        case Op::KvWrite:
            takes(2);
            require(e.kv != nullptr, "a cache is missing");
            require(e.group >= 0, "the group is negative");
            for (int i : e.in)
                require(buffer(i).rows == RowsOf::Tokens &&
                            buffer(i).width == heads_of(e.kv->kv_heads, e.kv->head_dim),
                        "keys or values do not fit the cache");
            break;
        case Op::Attention:
            takes(1);
            as_wide_as_output();
            require(of_tokens && e.kv != nullptr, "a cache is missing");
            require(heads_of(e.heads, e.head_dim) == width && e.head_dim == e.kv->head_dim &&
                        e.heads % e.kv->kv_heads == 0,
                    "the heads do not fit the cache");
            require(e.window >= 0 && e.group >= 0, "the window, or the group, is negative");
            break;
        case Op::TakeRows:
            takes(1);
            as_wide_as_output();
            require(!of_tokens && buffer(e.in[0]).rows == RowsOf::Tokens,
                    "rows are taken from those of tokens, to those of logits or hidden states");
            break;
    }
}

void Program::check_batch(const Batch &batch) const {
    if (batch.tokens > kMostTokens) throw std::out_of_range("the batch has too many tokens");
    if (batch.logits > batch.tokens || batch.hidden > batch.tokens)
        throw std::out_of_range("results are asked for more rows than there are tokens");
    require_below(batch.logits_indices, batch.logits, batch.tokens, "logits index");
    require_below(batch.hidden_indices, batch.hidden, batch.tokens, "hidden states index");
    require_below(batch.cu_seqlens_q, batch.requests + 1, batch.tokens + 1, "cu_seqlens_q");
    if (batch.cu_seqlens_q[0] != 0 ||
        static_cast<size_t>(batch.cu_seqlens_q[batch.requests]) != batch.tokens)
        throw std::out_of_range("cu_seqlens_q does not add up to the tokens of the batch");
    for (size_t r = 0; r < batch.requests; r++) {
        const int32_t queries = batch.cu_seqlens_q[r + 1] - batch.cu_seqlens_q[r];
        if (queries < 0 || batch.seq_lens[r] < queries)
            throw std::out_of_range("a request has more new tokens than tokens");
        if (static_cast<size_t>(batch.seq_lens[r]) > kMostTokens)
            throw std::out_of_range("a request has too many tokens");
    }
    std::set<std::tuple<Op, int, size_t, int>> checked;
    for (const Entry &e : entries_) {
        if (e.op == Op::Embed)
            require_below(batch.rows_of(e), batch.tokens, e.weight->outputs, "row");
        if (e.op != Op::KvWrite && e.op != Op::Attention) continue;
        const int group = e.group;
        if (static_cast<size_t>(group) >= batch.groups)
            throw std::out_of_range("the batch has no group " + std::to_string(group));
        if (!checked.emplace(e.op, group, e.kv->chunks, e.kv->chunks_per_block).second)
            continue;  // as in the layer before
        if (e.op == Op::KvWrite) {
            require_below(batch.slots_of(group), batch.tokens, e.kv->chunks * kChunk, "slot");
            continue;
        }
        const size_t block_size = static_cast<size_t>(e.kv->chunks_per_block) * kChunk;
        for (size_t r = 0; r < batch.requests; r++) {
            const size_t blocks =
                (static_cast<size_t>(batch.seq_lens[r]) + block_size - 1) / block_size;
            if (blocks > batch.table_width)
                throw std::out_of_range("a block table is shorter than its request");
            require_below(batch.block_tables_of(group) + r * batch.table_width, blocks,
                          e.kv->chunks / static_cast<size_t>(e.kv->chunks_per_block), "block");
        }
    }
}

}  // namespace pellucid
