// Replays a captured program: allocates memory for a batch, and divides each entry into shares for
// the threads.
#include "program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>

#include "ticks.h"

namespace pellucid {
namespace {

struct Range {
    size_t first, last;
};

Range part(size_t count, size_t share, size_t shares) {
    return {count * share / shares, count * (share + 1) / shares};
}

Range row_tiles(const Weight &weight, size_t share, size_t shares) {
    return part((weight.outputs + kTileRows - 1) / kTileRows, share, shares);
}

}  // namespace

Program::Program(const Kernels *kernels, std::shared_ptr<ThreadPool> pool,
                 std::vector<Buffer> buffers, size_t bytes_per_token, int output, int hidden)
    : kernels_(kernels),
      pool_(std::move(pool)),
      buffers_(std::move(buffers)),
      bytes_per_token_(bytes_per_token),
      output_(output),
      hidden_(hidden) {
    check_buffers();
}

void Program::add(Entry entry) {
    check_entry(entry);
    size_t bytes = 0;
    if (entry.op == Op::Linear && dense_bytes(entry.weight->format) == 0)
        bytes = scratch_bytes(entry.weight->inputs);
    if (entry.op == Op::Attention)
        bytes = kernels_->attention_scratch(entry.kv->kv_heads, entry.head_dim) * sizeof(float);
    if (bytes > scratch_bytes_) {
        scratch_bytes_ = bytes;
        scratch_.clear();
    }
    entries_.push_back(std::move(entry));
}

float *Program::floats(int buffer, Results out) const {
    if (buffer == output_) return out.output;
    if (buffer == hidden_) return out.hidden;
    return reinterpret_cast<float *>(arena_.get() +
                                     buffers_[static_cast<size_t>(buffer)].offset * capacity_);
}

Quantized Program::quantized(int buffer) const {
    const Buffer &b = buffers_[static_cast<size_t>(buffer)];
    uint8_t *p = arena_.get() + b.offset * capacity_;
    const size_t blocks = b.width / kTileInputs * capacity_;
    float *scales = reinterpret_cast<float *>(p + b.width * capacity_);
    int32_t *sums = reinterpret_cast<int32_t *>(scales + blocks);
    return {reinterpret_cast<int8_t *>(p), scales, sums, sums + blocks};
}

// Allocate memory for this batch, before any thread works. Only this function and divide() can fail
// for lack of memory.
void Program::make_room(const Batch &batch) {
    if (batch.tokens > capacity_) {
        const size_t capacity =
            (batch.tokens + 15) / 16 * 16;  // so that every buffer begins at a multiple of 64 bytes
        if (bytes_per_token_ > kMostBytes / capacity) throw std::bad_alloc();
        arena_ = allocate(bytes_per_token_ * capacity);
        capacity_ = capacity;
    }
    while (scratch_.size() < pool_->size()) scratch_.push_back(allocate(scratch_bytes_));
}

// Divide the entries into stages at their barriers. An attention that is divided by splits becomes
// two stages, and gets memory for its partial results.
void Program::divide(const Batch &batch, Results out) {
    stages_.clear();
    for (size_t i = 0; i < entries_.size(); i++) {
        const Entry &e = entries_[i];
        if (e.barrier || stages_.empty())
            stages_.push_back({i, i + 1, false});
        else
            stages_.back().last = i + 1;
        if (e.op != Op::Attention) continue;
        const size_t size = kernels_->attention_partials_size(attention_args(e, batch, out),
                                                              batch.tokens, pool_->size());
        if (size == 0) continue;
        if (size > partials_.size()) partials_.resize(size);
        stages_.push_back({i, i + 1, true});
    }
}

void Program::run(const Batch &batch, Results out, double *seconds) {
    check_batch(batch);
    using Clock = std::chrono::steady_clock;
    const bool timed = seconds != nullptr;
    Clock::time_point began;
    uint64_t first_tick = 0;
    const auto prepare = [&] {
        make_room(batch);
        divide(batch, out);
        if (timed) {
            ticks_.resize(pool_->size() * ticks_per_share());
            began = Clock::now();
            first_tick = read_ticks();
        }
        return stages_.size();
    };
    pool_->run(prepare, [&](size_t stage, size_t share) {
        const auto [first, last, merge] = stages_[stage];
        uint64_t *tick = timed ? &ticks_[tick_index(stage, share)] : nullptr;
        if (timed && last - first > 1) *tick = read_ticks();
        for (size_t i = first; i < last; i++) {
            execute(i, merge && i == first, batch, out, share);
            if (timed) *++tick = read_ticks();
        }
    });
    if (timed) {
        const std::chrono::duration<double> lasted = Clock::now() - began;
        const uint64_t last_tick = read_ticks();
        const double ticks = static_cast<double>(last_tick - first_tick);
        add_seconds(first_tick, last_tick, ticks > 0 ? lasted.count() / ticks : 0, seconds);
    }
}

// The ticks of a share lie together and in cache lines of their own: threads that write to the same
// line wait for each other.
size_t Program::ticks_per_share() const {
    constexpr size_t kLine = 64 / sizeof(uint64_t);
    return (entries_.size() + 2 * stages_.size() + 2 * kLine - 1) / kLine * kLine;
}

// Where the ticks of a share of a stage lie: when it begins, where the stage has several entries,
// and after each entry.
size_t Program::tick_index(size_t stage, size_t share) const {
    return share * ticks_per_share() + stages_[stage].first + 2 * stage;
}

// A stage lasts from the end of the one before it to the end of its last share; the last stage
// lasts until the caller goes on, which may have slept. Divide that time between its entries by
// what they took in all shares together.
void Program::add_seconds(uint64_t start, uint64_t last_tick, double per_tick,
                          double *seconds) const {
    const size_t shares = pool_->size();
    for (size_t stage = 0; stage < stages_.size(); stage++) {
        const auto [first, last, merge] = stages_[stage];
        const size_t count = last - first;
        const auto ticks = [&](size_t share) { return &ticks_[tick_index(stage, share)]; };
        uint64_t end = stage + 1 < stages_.size() ? start : last_tick, all = 0;
        for (size_t share = 0; share < shares; share++) {
            end = std::max(end, ticks(share)[count]);
            if (count > 1) all += ticks(share)[count] - ticks(share)[0];
        }
        const double lasted = static_cast<double>(end - start) * per_tick;
        if (all == 0) seconds[first] += lasted;
        const double scale = all > 0 ? lasted / static_cast<double>(all) : 0;
        for (size_t i = 0; i < count && all > 0; i++) {
            uint64_t own = 0;
            for (size_t share = 0; share < shares; share++)
                own += ticks(share)[i + 1] - ticks(share)[i];
            seconds[first + i] += static_cast<double>(own) * scale;
        }
        start = end;
    }
}

AttentionArgs Program::attention_args(const Entry &e, const Batch &batch, Results out) {
    return {floats(e.in[0], out),
            e.kv->k.get(),
            e.kv->v.get(),
            e.kv->k_type,
            e.kv->v_type,
            batch.cu_seqlens_q,
            batch.seq_lens,
            batch.block_tables_of(e.group),
            batch.requests,
            batch.table_width,
            e.heads,
            e.kv->kv_heads,
            e.kv->head_dim,
            e.kv->chunks_per_block,
            static_cast<float>(e.scale),
            static_cast<float>(e.cap),
            e.window,
            floats(e.out, out),
            partials_.data()};
}

// The address where the same share of the next matrix begins.
const uint8_t *Program::next_weights(size_t entry, size_t share) const {
    for (size_t i = entry + 1; i < entries_.size(); i++) {
        if (entries_[i].op != Op::Linear) continue;
        const Weight &w = *entries_[i].weight;
        const size_t tiles = (w.outputs + kTileRows - 1) / kTileRows;
        return w.tiles.get() + row_tiles(w, share, pool_->size()).first * (w.bytes / tiles);
    }
    return nullptr;
}

void Program::execute(size_t index, bool merge, const Batch &batch, Results out, size_t share) {
    const Entry &e = entries_[index];
    const size_t shares = pool_->size();
    const bool writes = e.out >= 0;
    const Buffer *to = writes ? &buffers_[static_cast<size_t>(e.out)] : nullptr;
    const size_t rows = writes ? batch.count(to->rows) : batch.tokens;
    const auto [first, last] =
        part(rows, share, shares);  // of ops that treat each token on its own
    float *y = writes && !to->quantized ? floats(e.out, out) : nullptr;
    const auto x = [&](size_t i) { return floats(e.in[i], out); };
    const auto vector = [&](size_t i) {
        return i < e.vectors.size() && e.vectors[i] ? e.vectors[i]->values.data() : nullptr;
    };

    switch (e.op) {
        case Op::Embed: {
            const int32_t *ids = batch.rows_of(e);
            for (size_t t = first; t < last; t++)
                decode_row(e.weight->format, e.weight->tiles.get(), static_cast<size_t>(ids[t]),
                           e.weight->inputs, static_cast<float>(e.scale), y + t * to->width);
            break;
        }
        case Op::Quantize:
            kernels_->quantize(x(0), e.weight ? e.weight->order.data() : nullptr, to->width,
                               quantized(e.out), first, last);
            break;
        case Op::QuantizeRows:
            kernels_->quantize_rows(x(0), to->width, quantized(e.out), first, last);
            break;
        case Op::Linear: {
            const bool packed = buffers_[static_cast<size_t>(e.in[0])].quantized;
            LinearArgs args{e.weight->format,
                            e.weight->tiles.get(),
                            e.weight->outputs,
                            e.weight->inputs,
                            vector(0),
                            packed ? nullptr : x(0),
                            packed ? quantized(e.in[0]) : Quantized{},
                            rows,
                            y,
                            scratch_[share].get(),
                            next_weights(index, share)};
            const auto [from, until] = row_tiles(*e.weight, share, shares);
            kernels_->linear(args, from, until);
            break;
        }
        case Op::RmsNorm:
        case Op::LayerNorm: {
            const size_t width = static_cast<size_t>(e.width), parts = to->width / width;
            if (e.op == Op::RmsNorm)
                kernels_->rms_norm(x(0), vector(0), static_cast<float>(e.eps), width, y,
                                   first * parts, last * parts);
            else
                kernels_->layer_norm(x(0), vector(0), vector(1), static_cast<float>(e.eps), width,
                                     y, first * parts, last * parts);
            break;
        }
#define ELEMENTWISE(Name, name, inputs)                                          \
    case Op::Name:                                                               \
        kernels_->name(x(0) + first * to->width,                                 \
                       inputs > 1 ? x(inputs - 1) + first * to->width : nullptr, \
                       y + first * to->width, (last - first) * to->width);       \
        break;
#include "ops.inc"
        case Op::Softcap:
            kernels_->softcap(x(0) + first * to->width, static_cast<float>(e.cap),
                              y + first * to->width, (last - first) * to->width);
            break;
        case Op::RopeAngles: {  // in float64: at position 100,000 a float32 angle is off by a
                                // hundredth
            const size_t half = to->width / 2;
            for (size_t t = first; t < last; t++)
                for (size_t i = 0; i < half; i++) {
                    const double angle = static_cast<double>(batch.positions[t]) * e.inv_freq[i];
                    float *row = y + t * to->width;
                    row[i] = static_cast<float>(std::cos(angle) * e.scale);
                    row[half + i] = static_cast<float>(std::sin(angle) * e.scale);
                }
            break;
        }
        case Op::Rope:
            kernels_->rope(x(0), x(1), e.heads, e.head_dim,
                           static_cast<int>(buffers_[static_cast<size_t>(e.in[1])].width), y, first,
                           last);
            break;
        case Op::KvWrite:
            for (const bool keys : {true, false})
                kernels_->kv_write({x(keys ? 0 : 1), batch.slots_of(e.group), e.kv->kv_heads,
                                    e.kv->head_dim, keys ? e.kv->k_type : e.kv->v_type, keys,
                                    keys ? e.kv->k.get() : e.kv->v.get()},
                                   first, last);
            break;
        case Op::Attention: {
            const AttentionArgs args = attention_args(e, batch, out);
            float *scratch = reinterpret_cast<float *>(scratch_[share].get());
            const size_t size = kernels_->attention_partials_size(args, batch.tokens, shares);
            if (size == 0) {
                kernels_->attention(args, scratch, share, shares);
                break;
            }
            const size_t splits = size / (batch.tokens * static_cast<size_t>(e.heads) *
                                          static_cast<size_t>(e.kv->head_dim + 2));
            if (merge)
                kernels_->attention_merge(args, scratch, splits, share, shares);
            else
                kernels_->attention_partials(args, scratch, splits, share, shares);
            break;
        }
        case Op::TakeRows: {
            const int32_t *indices = batch.indices_of(to->rows);
            for (size_t r = first; r < last; r++)
                std::memcpy(y + r * to->width, x(0) + static_cast<size_t>(indices[r]) * to->width,
                            to->width * sizeof(float));
            break;
        }
    }
}

}  // namespace pellucid
