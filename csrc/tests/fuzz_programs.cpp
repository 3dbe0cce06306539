// Random programs and batches, most of them invalid: each is refused, or runs within its memory.
//
// A program has some buffers in an arena without slack, and entries whose parts are random, half of
// the time so that they fit. Refused entries are left out. The others run on batches in which one
// number may be wrong. Arrays are of the exact size, so that a sanitizer finds a read or a write
// beyond them (scripts/sanitize). Random numbers are drawn from a fixed seed.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "../program.h"
#include "support.h"

using namespace pellucid;

namespace {

constexpr int kRounds = 4000, kMostTokens = 40, kWords = 24;
constexpr size_t kWidths[] = {1, 2, 16, 32, 48, 64, 96};

template <class T>
const T &pick(const std::vector<T> &from) {
    return from[static_cast<size_t>(random_int(0, static_cast<int>(from.size()) - 1))];
}
size_t pick_width() { return kWidths[random_int(0, 6)]; }
bool often() { return random_int(0, 9) > 0; }
bool rarely() { return random_int(0, 19) == 0; }

int any_int() {
    constexpr int kMost = std::numeric_limits<int>::max(), kLeast = std::numeric_limits<int>::min();
    const int extremes[] = {-1, 0, 1, kMost, kMost - 1, kLeast, 1 << 30};
    return often() ? random_int(-2, 100) : extremes[random_int(0, 6)];
}

// The parts that entries of all programs may use.
struct Parts {
    std::vector<std::shared_ptr<Weight>> weights{nullptr};
    std::vector<std::shared_ptr<Vector>> vectors{nullptr};
    std::vector<std::shared_ptr<KVStore>> caches{nullptr};

    Parts() {
        for (size_t width : kWidths)
            vectors.push_back(std::make_shared<Vector>(std::vector<float>(width, 0.5f)));
        for (const Format format : {Format::F32, Format::F16, Format::Q8_0, Format::Q4_1,
                                    Format::UInt4_32, Format::Int8_Row})
            for (size_t outputs : kWidths)
                for (size_t inputs : kWidths) add_weight(format, outputs, inputs);
        add_weight(Format::F32, kWords, 32);
        for (const KvType type : {KvType::F32, KvType::F16, KvType::Int8, KvType::Int4})
            for (const int head_dim : {1, 16, 32})
                if (type != KvType::Int4 || head_dim % kKvGroup == 0)
                    for (const int heads : {1, 2, 3}) add_cache(type, heads, head_dim);
    }

    void add_weight(Format format, size_t outputs, size_t inputs) {
        const int element = dense_bytes(format);
        const TileFormat f = tile_format(format);
        if (!element && inputs % static_cast<size_t>(f.file_inputs)) return;
        const size_t tiles = (outputs + kTileRows - 1) / kTileRows;
        const size_t bytes = tiles * (element ? inputs * kTileRows * static_cast<size_t>(element)
                                              : f.row_tile_bytes(inputs));
        weights.push_back(
            std::make_shared<Weight>(Weight{format, outputs, inputs, bytes, allocate(bytes)}));
        if (format == Format::UInt4_32)  // its inputs lie in another order: backwards
            for (size_t i = inputs; i-- > 0;)
                weights.back()->order.push_back(static_cast<int32_t>(i));
    }
    void add_cache(KvType type, int heads, int head_dim) {
        const int chunks = random_int(1, 3), blocks = random_int(1, 4);
        const size_t bytes =
            static_cast<size_t>(chunks * blocks * heads) * kv_chunk_bytes(type, head_dim);
        caches.push_back(std::make_shared<KVStore>(KVStore{static_cast<size_t>(chunks * blocks),
                                                           heads, head_dim, chunks, type, type,
                                                           allocate(bytes), allocate(bytes)}));
    }
};

std::vector<Buffer> random_buffers(size_t &bytes_per_token) {
    std::vector<Buffer> buffers;
    size_t end = 0;
    for (int n = random_int(2, 8); n > 0; n--) {
        const RowsOf rows =
            random_int(0, 3) > 0 ? RowsOf::Tokens : static_cast<RowsOf>(random_int(1, 2));
        Buffer b{end, pick_width(), random_int(0, 2) == 0, rows};
        if (rarely()) b.offset = static_cast<size_t>(random_int(0, 300));
        if (rarely())
            b.offset = std::numeric_limits<size_t>::max() - static_cast<size_t>(random_int(0, 300));
        if (rarely()) b.width = static_cast<size_t>(any_int());
        buffers.push_back(b);
        end += b.quantized ? b.width + b.width / 2 : b.width * 4;
    }
    bytes_per_token = rarely() ? static_cast<size_t>(any_int()) : end;
    return buffers;
}

// An entry that often fits its buffers: widths, weights and heads are chosen by trial.
Entry random_entry(const std::vector<Buffer> &buffers, const Parts &parts) {
    const int last = static_cast<int>(buffers.size()) - 1;
    Entry e{.op = static_cast<Op>(random_int(0, static_cast<int>(Op::TakeRows))),
            .out = random_int(0, last),
            .barrier = random_int(0, 1) == 0};
    // parts that fit the op
    const int width = static_cast<int>(buffers[static_cast<size_t>(e.out)].width);
    e.head_dim = pick(std::vector<int>{1, 2, 16, 32});
    e.heads = width / e.head_dim;
    e.width = pick(std::vector<int>{1, 2, 16, 32, width});
    e.learned = random_int(0, 1), e.group = random_int(0, 1), e.window = random_int(0, 30);
    e.scale = 0.5, e.eps = 1e-5, e.cap = random_int(0, 1) * 3.0;
    const auto of_size = [](int n) { return static_cast<size_t>(std::clamp(n, 0, 1000)); };
    e.inv_freq.assign(of_size(width) / 2, 0.5);
    const auto add_norms = [&](int count) {
        for (; count > 0; count--)
            e.vectors.push_back(std::make_shared<Vector>(std::vector<float>(of_size(e.width))));
    };
    int inputs = random_int(1, 2);
    if (e.op == Op::Embed || e.op == Op::RopeAngles) inputs = 0;
    if (e.op == Op::Rope || e.op == Op::KvWrite) inputs = 2;
    if (e.op == Op::Linear || e.op == Op::Attention || e.op == Op::TakeRows) inputs = 1;
    if (e.op == Op::RmsNorm) inputs = 1, add_norms(1);
    if (e.op == Op::LayerNorm) inputs = 1, add_norms(2);
    if (e.op == Op::KvWrite) e.out = -1;
    for (; inputs > 0; inputs--) e.in.push_back(random_int(0, last));
    if (e.op == Op::Embed || e.op == Op::Linear || (e.op == Op::Quantize && random_int(0, 1)))
        e.weight = pick(parts.weights);
    if (e.op == Op::KvWrite || e.op == Op::Attention) e.kv = pick(parts.caches);
    // parts that may be wrong
    if (rarely()) e.in.push_back(any_int());
    if (rarely()) e.out = any_int();
    if (rarely()) e.inv_freq.push_back(1.0);
    if (rarely()) e.vectors.push_back(pick(parts.vectors));
    for (int *number : {&e.heads, &e.head_dim, &e.width, &e.learned, &e.group, &e.window})
        if (random_int(0, 99) == 0) *number = any_int();
    return e;
}

// One to three requests, in blocks that any cache has; then perhaps one number that is wrong.
struct Step {
    std::vector<int32_t> ids, positions, logits, hidden, cu{0}, lens, tables, slots;
    size_t width = 0, groups = 2;

    Step() {
        for (int r = random_int(1, 3); r > 0; r--) {
            const int queries = random_int(0, kMostTokens / 3);
            lens.push_back(queries + random_int(0, 40));
            cu.push_back(cu.back() + queries);
        }
        const int tokens = cu.back();
        for (int t = 0; t < tokens; t++) {
            ids.push_back(random_int(0, kWords - 1));
            positions.push_back(random_int(0, 15));
            if (random_int(0, 2) == 0) logits.push_back(t);
            if (random_int(0, 2) == 0) hidden.push_back(t);
        }
        const size_t wide = static_cast<size_t>(random_int(1, 5));
        width = wide;
        for (size_t i = 0; i < groups * lens.size() * width; i++)
            tables.push_back(random_int(0, 1) * random_int(0, 3));
        for (size_t i = 0; i < groups * ids.size(); i++) slots.push_back(random_int(0, 15));
        std::vector<int32_t> *arrays[] = {&ids, &positions, &logits, &hidden,
                                          &cu,  &lens,      &tables, &slots};
        if (std::vector<int32_t> &a = *arrays[random_int(0, 7)];
            random_int(0, 1) == 0 && !a.empty())
            a[random_bits() % a.size()] = any_int();
        if (rarely()) groups = static_cast<size_t>(random_int(0, 1));
    }
    Batch batch() const {
        return {ids.data(),    positions.data(), logits.data(), hidden.data(), cu.data(),
                lens.data(),   tables.data(),    slots.data(),  ids.size(),    logits.size(),
                hidden.size(), lens.size(),      width,         groups};
    }
};

void fuzz(const Kernels *kernels) {
    const Parts parts;
    std::vector<std::shared_ptr<ThreadPool>> pools{std::make_shared<ThreadPool>(1),
                                                   std::make_shared<ThreadPool>(2)};
    int refused = 0, entries = 0, ran = 0;
    for (int round = 0; round < kRounds; round++) {
        size_t bytes_per_token;
        const std::vector<Buffer> buffers = random_buffers(bytes_per_token);
        try {
            Program program(
                kernels, pick(pools), buffers, bytes_per_token,
                rarely() ? any_int() : random_int(0, static_cast<int>(buffers.size()) - 1),
                random_int(0, 3) > 0 ? -1 : random_int(-2, static_cast<int>(buffers.size())));
            for (int n = 0; n < 120; n++) try {
                    program.add(random_entry(buffers, parts));
                    entries++;
                } catch (const std::invalid_argument &) {
                    refused++;
                }
            for (int n = 0; n < 3; n++) try {
                    const Step step;
                    if (step.ids.empty() || program.output().width > 1000) continue;
                    if (program.hidden() && program.hidden()->width > 1000) continue;
                    const auto room_for = [&](const Buffer &b) {
                        return std::vector<float>(step.batch().count(b.rows) * b.width);
                    };
                    std::vector<float> out = room_for(program.output()), hidden;
                    if (program.hidden()) hidden = room_for(*program.hidden());
                    program.run(step.batch(), {out.data(), hidden.data()});
                    ran++;
                } catch (const std::out_of_range &) {
                    refused++;
                } catch (const std::bad_alloc &) {  // an arena that no machine has
                    refused++;
                }
        } catch (const std::invalid_argument &) {
            refused++;
        }
    }
    std::printf("  %d entries taken, %d runs, %d refusals\n", entries, ran, refused);
    check(entries > kRounds && ran > kRounds / 4, "enough programs ran to mean something");
}

}  // namespace

int main() { return for_usable_kernels(fuzz); }
