// Runs programs as the engine does, without Python: one layer of a model on several threads, wrong
// programs, wrong batches, pools.
//
// - tiles: every format is put into tiles and read back row by row, from and to arrays of the exact
//   size.
// - bits: the same on 1, 2 and 4 threads, in one step and token by token, with a context that is
//   divided by splits and without.
// - wrong: every entry and every batch that does not fit is an exception, and valid ones still run
//   after.
// - stages: every share of a stage is worked on once, and none before the stage before it is done,
//   however few the cores and late the threads.
// - pools: two threads that use one pool take turns; what is thrown reaches the caller; a child
//   after fork() makes a team of its own.
//
// Built with sanitizers by scripts/sanitize: a data race, a read too far or undefined behaviour
// ends it.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../float16.h"
#include "../program.h"
#include "support.h"

using namespace pellucid;

namespace {

// ---- one layer: 64 wide, 4 heads of 16 over 2 KV heads, 48 words

constexpr size_t kWidth = 64, kKvWidth = 32, kWords = 48, kTokens = 700;
constexpr int kHeads = 4, kKvHeads = 2, kHeadDim = 16;
enum : int {
    X,
    NORMED,
    PACKED,
    Q,
    K,
    V,
    ANGLES,
    TURNED_Q,
    TURNED_K,
    SEEN,
    TAKEN,
    PACKED_TAKEN,
    LOGITS,
    HIDDEN
};

std::shared_ptr<Weight> random_weight(ThreadPool &pool, Format format, size_t outputs,
                                      size_t inputs) {
    const TileFormat f = tile_format(format);
    const size_t row_tiles = (outputs + kTileRows - 1) / kTileRows,
                 row = f.bits ? f.file_row_bytes(inputs) : inputs * 4;
    std::vector<uint8_t> file(outputs * row);
    for (size_t i = 0; i < file.size(); i++) file[i] = static_cast<uint8_t>(random_bits());
    if (f.bits)  // the first float16 of each block is its scale
        for (size_t b = 0; b < file.size(); b += static_cast<size_t>(f.file_bytes)) {
            const uint16_t scale = f16_from_float(0.02f);
            std::memcpy(&file[b], &scale, 2);
        }
    else
        for (size_t i = 0; i < file.size(); i += 4) {
            const float x = random_float(1.0f);
            std::memcpy(&file[i], &x, 4);
        }
    const size_t bytes = row_tiles * (f.bits ? f.row_tile_bytes(inputs) : inputs * kTileRows * 4);
    auto weight = std::make_shared<Weight>(Weight{format, outputs, inputs, bytes, nullptr});
    const auto prepare = [&] {
        weight->tiles = allocate(bytes);
        return size_t{1};
    };
    pool.run(prepare, [&](size_t, size_t share) {
        const size_t first = row_tiles * share / pool.size(),
                     last = row_tiles * (share + 1) / pool.size();
        if (f.bits)
            repack(format, file.data(), outputs, inputs, weight->tiles.get(), first, last);
        else
            repack_dense(format, file.data(), outputs, inputs, weight->tiles.get(), first, last);
    });
    return weight;
}

struct Layer {
    std::shared_ptr<Weight> words, q, k, v, head;
    std::shared_ptr<Vector> norm, bias;
    int window;

    Layer(ThreadPool &pool, int window) : window(window) {
        words = random_weight(pool, Format::F32, kTokens, kWidth);
        q = random_weight(pool, Format::Q8_0, kWidth, kWidth);
        k = random_weight(pool, Format::Q4_0, kKvWidth, kWidth);
        v = random_weight(pool, Format::Q5_0, kKvWidth, kWidth);
        head = random_weight(pool, Format::IQ4_NL, kWords, kWidth);
        norm = std::make_shared<Vector>(Vector{std::vector<float>(kWidth, 1.0f)});
        bias = std::make_shared<Vector>(Vector{std::vector<float>(kWords, 0.5f)});
    }

    static std::vector<Buffer> buffers() {
        std::vector<Buffer> out;
        size_t offset = 0;
        const auto place = [&](size_t width, bool quantized, RowsOf rows) {
            out.push_back({offset, width, quantized, rows});
            offset += quantized ? width + width / 2 : width * 4;
        };
        for (size_t width : {kWidth, kWidth}) place(width, false, RowsOf::Tokens);
        place(kWidth, true, RowsOf::Tokens);
        for (size_t width :
             {kWidth, kKvWidth, kKvWidth, size_t{kHeadDim}, kWidth, kKvWidth, kWidth})
            place(width, false, RowsOf::Tokens);
        place(kWidth, false, RowsOf::Logits);
        place(kWidth, true, RowsOf::Logits);
        out.push_back({0, kWords, false, RowsOf::Logits});
        out.push_back({0, kWidth, false, RowsOf::Hidden});
        return out;
    }
    static size_t bytes_per_token() { return buffers()[PACKED_TAKEN].offset + kWidth + kWidth / 2; }

    std::vector<Entry> entries(const std::shared_ptr<KVStore> &kv) const {
        std::vector<double> angles;
        for (int i = 0; i < kHeadDim / 2; i++) angles.push_back(1.0 / (1 + i));
        return {
            {.op = Op::Embed, .out = X, .weight = words, .scale = 1.0},
            {.op = Op::RmsNorm,
             .in = {X},
             .out = NORMED,
             .vectors = {norm},
             .width = kWidth,
             .eps = 1e-5},
            {.op = Op::Quantize, .in = {NORMED}, .out = PACKED},
            {.op = Op::Linear, .in = {PACKED}, .out = Q, .weight = q, .barrier = true},
            {.op = Op::Linear, .in = {PACKED}, .out = K, .weight = k},
            {.op = Op::Linear, .in = {PACKED}, .out = V, .weight = v},
            {.op = Op::RopeAngles,
             .out = ANGLES,
             .barrier = true,
             .scale = 1.0,
             .inv_freq = angles},
            {.op = Op::Rope,
             .in = {Q, ANGLES},
             .out = TURNED_Q,
             .heads = kHeads,
             .head_dim = kHeadDim},
            {.op = Op::Rope,
             .in = {K, ANGLES},
             .out = TURNED_K,
             .heads = kKvHeads,
             .head_dim = kHeadDim},
            {.op = Op::KvWrite, .in = {TURNED_K, V}, .kv = kv},
            {.op = Op::Attention,
             .in = {TURNED_Q},
             .out = SEEN,
             .kv = kv,
             .barrier = true,
             .heads = kHeads,
             .head_dim = kHeadDim,
             .window = window,
             .scale = 0.25,
             .cap = 30.0},
            {.op = Op::TakeRows, .in = {SEEN}, .out = TAKEN, .barrier = true},
            {.op = Op::TakeRows, .in = {SEEN}, .out = HIDDEN},
            {.op = Op::Quantize, .in = {TAKEN}, .out = PACKED_TAKEN},
            {.op = Op::Linear,
             .in = {PACKED_TAKEN},
             .out = LOGITS,
             .weight = head,
             .vectors = {bias},
             .barrier = true},
            {.op = Op::Softcap, .in = {LOGITS}, .out = LOGITS, .barrier = true, .cap = 20.0},
        };
    }
};

std::shared_ptr<KVStore> new_cache() {  // blocks of 32 tokens, one more than are needed
    const size_t chunks = kTokens / kChunk + 4,
                 bytes = chunks * kKvHeads * kHeadDim * kChunk * sizeof(uint16_t);
    return std::make_shared<KVStore>(KVStore{chunks, kKvHeads, kHeadDim, 2, KvType::F16,
                                             KvType::F16, allocate(bytes), allocate(bytes)});
}

Program new_program(const Kernels *kernels, const std::shared_ptr<ThreadPool> &pool,
                    const Layer &layer) {
    Program program(kernels, pool, Layer::buffers(), Layer::bytes_per_token(), LOGITS, HIDDEN);
    for (Entry &e : layer.entries(new_cache())) program.add(std::move(e));
    return program;
}

// Tokens first … last - 1 of one request, whose blocks lie backwards; logits of every token, and
// the hidden states of every token at an even position. Arrays of the exact size.
struct Step {
    std::vector<int32_t> ids, positions, logits, hidden, cu, lens, table, slots;
    std::vector<float> out, hidden_out;

    Step(size_t first, size_t last)
        : cu{0, static_cast<int32_t>(last - first)}, lens{static_cast<int32_t>(last)} {
        for (size_t b = 0; b * 32 < last; b++)
            table.push_back(static_cast<int32_t>(kTokens / 32 - b));
        for (size_t t = first; t < last; t++) {
            ids.push_back(static_cast<int32_t>(t * 17 % kTokens));
            positions.push_back(static_cast<int32_t>(t));
            logits.push_back(static_cast<int32_t>(t - first));
            if (t % 2 == 0) hidden.push_back(static_cast<int32_t>(t - first));
            slots.push_back(table[t / 32] * 32 + static_cast<int32_t>(t % 32));
        }
        out.resize(logits.size() * kWords);
        hidden_out.resize(hidden.size() * kWidth);
    }
    Batch batch() const {
        return {ids.data(),    positions.data(),
                logits.data(), hidden.data(),
                cu.data(),     lens.data(),
                table.data(),  slots.data(),
                ids.size(),    logits.size(),
                hidden.size(), lens.size(),
                table.size(),  1};
    }
    const std::vector<float> &run(Program &program, double *seconds = nullptr) {
        program.run(batch(), {out.data(), hidden_out.data()}, seconds);
        return out;
    }
};

void check_bits(const Kernels *kernels) {
    for (int window : {0, 40, 300}) {
        auto one = std::make_shared<ThreadPool>(1);
        const Layer layer(*one, window);
        Program measure = new_program(kernels, one, layer);
        Step all(0, kTokens);
        const std::vector<float> whole = all.run(measure);
        for (size_t threads : {1, 2, 4}) {
            auto pool = std::make_shared<ThreadPool>(threads);
            Program program = new_program(kernels, pool, layer);
            std::vector<float> parts, hidden;
            std::vector<double> seconds(program.size());
            for (size_t first = 0, size = 1; first < kTokens;
                 first += size, size = first > 600 ? 1 : 1 + first % 67) {
                Step step(first, std::min(first + size, kTokens));
                const auto &out = step.run(program, first % 2 ? seconds.data() : nullptr);
                parts.insert(parts.end(), out.begin(), out.end());
                hidden.insert(hidden.end(), step.hidden_out.begin(), step.hidden_out.end());
            }
            check(parts.size() == whole.size() &&
                      std::memcmp(parts.data(), whole.data(), whole.size() * sizeof(float)) == 0 &&
                      hidden == all.hidden_out,
                  "in parts on " + std::to_string(threads) + " threads, window " +
                      std::to_string(window));
        }
    }
}

template <class E>
void throws(const std::string &what, const std::function<void()> &f) {
    try {
        f();
        check(false, what + " is not refused");
    } catch (const E &) {
    }
}

void check_refusals(const Kernels *kernels) {
    auto pool = std::make_shared<ThreadPool>(2);
    const Layer layer(*pool, 0);
    const auto cache = new_cache();
    const auto entries = layer.entries(cache);
    for (size_t i = 0; i < entries.size(); i++) {
        const auto refused = [&](const char *what, const std::function<void(Entry &)> &change) {
            Program program(kernels, pool, Layer::buffers(), Layer::bytes_per_token(), LOGITS,
                            HIDDEN);
            Entry e = entries[i];
            change(e);
            throws<std::invalid_argument>("entry " + std::to_string(i) + " with " + what,
                                          [&] { program.add(e); });
        };
        refused("an input too many", [](Entry &e) { e.in.push_back(X), e.in.push_back(X); });
        refused("an input that is no buffer", [](Entry &e) { e.in = {99, -1}; });
        refused("an output that is no buffer", [](Entry &e) { e.out = e.out < 0 ? 0 : 99; });
        refused("vectors of no size",
                [](Entry &e) { e.vectors.assign(3, std::make_shared<Vector>()); });
        if (entries[i].weight) refused("no weight", [](Entry &e) { e.weight = nullptr; });
        if (entries[i].kv) refused("no cache", [](Entry &e) { e.kv = nullptr; });
        if (entries[i].out >= 0)
            refused("an output of another width", [](Entry &e) {
                e.out = e.out == K || e.out == V || e.out == TURNED_K ? Q : K;
            });
        for (size_t j = 0; j < entries[i].in.size(); j++)
            refused("an input of another kind",
                    [&](Entry &e) { e.in[j] = e.in[j] == PACKED ? X : PACKED; });
    }
    throws<std::invalid_argument>("a buffer beyond the arena",
                                  [&] { Program(kernels, pool, Layer::buffers(), 100, LOGITS); });
    throws<std::invalid_argument>("a quantized output", [&] {
        Program(kernels, pool, Layer::buffers(), Layer::bytes_per_token(), PACKED);
    });
    throws<std::invalid_argument>("an output that is none", [&] {
        Program(kernels, pool, Layer::buffers(), Layer::bytes_per_token(), 99);
    });
    for (int hidden : {static_cast<int>(PACKED), static_cast<int>(LOGITS), 99, -2})
        throws<std::invalid_argument>("hidden states that cannot be a result", [&] {
            Program(kernels, pool, Layer::buffers(), Layer::bytes_per_token(), LOGITS, hidden);
        });

    Program program = new_program(kernels, pool, layer);
    const std::vector<float> before = Step(0, 70).run(program);
    const auto refused = [&](const char *what, const std::function<void(Step &)> &change) {
        Step step(40, 70);
        change(step);
        throws<std::out_of_range>(what, [&] { step.run(program); });
    };
    constexpr int32_t kMost = std::numeric_limits<int32_t>::max(),
                      kLeast = std::numeric_limits<int32_t>::min();
    for (int32_t bad : {-1, kMost, kLeast}) {
        refused("a token id", [&](Step &s) { s.ids[29] = bad; });
        refused("a slot", [&](Step &s) { s.slots[0] = bad; });
        refused("a block", [&](Step &s) { s.table[2] = bad; });
        refused("a logits index", [&](Step &s) { s.logits[5] = bad; });
        refused("a hidden states index", [&](Step &s) { s.hidden[5] = bad; });
        refused("a length", [&](Step &s) { s.lens[0] = bad; });
        refused("the first of cu_seqlens_q", [&](Step &s) { s.cu[0] = bad; });
        refused("the last of cu_seqlens_q", [&](Step &s) { s.cu[1] = bad; });
    }
    refused("a token id that is one too high", [](Step &s) { s.ids[0] = kTokens; });
    refused("a slot that is one too high",
            [](Step &s) { s.slots[0] = (kTokens / kChunk + 4) * kChunk; });
    refused("a block that is one too high",
            [](Step &s) { s.table[0] = (kTokens / kChunk + 4) / 2; });
    refused("a logits index that is one too high", [](Step &s) { s.logits[0] = 30; });
    refused("a length with a block too many", [](Step &s) { s.lens[0] = 97; });
    refused("more logits than tokens",
            [](Step &s) { s.logits.resize(31), s.out.resize(31 * kWords); });
    refused("more hidden states than tokens",
            [](Step &s) { s.hidden.resize(31), s.hidden_out.resize(31 * kWidth); });
    refused("a request of negative length",
            [](Step &s) { s.cu = {0, 31, 30}, s.lens = {70, 70}, s.table.resize(6); });
    check(Step(0, 70).run(program) == before, "a batch after those that were refused");
}

// ---- tiles

void check_tiles() {
    for (const TileFormat &f : kTileFormats) {
        const size_t inputs = 2 * static_cast<size_t>(f.file_inputs),
                     row = f.file_row_bytes(inputs);
        for (size_t rows : {1, 16, 37}) {
            const size_t row_tiles = (rows + kTileRows - 1) / kTileRows;
            std::vector<uint8_t> file(rows * row), tiles(row_tiles * f.row_tile_bytes(inputs)),
                shares(tiles.size());
            for (uint8_t &x : file) x = static_cast<uint8_t>(random_bits());
            repack(f.format, file.data(), rows, inputs, tiles.data(), 0, row_tiles);
            for (size_t t = row_tiles; t-- > 0;)
                repack(f.format, file.data(), rows, inputs, shares.data(), t, t + 1);
            check(tiles == shares, "tiles of format " + std::to_string(static_cast<int>(f.format)) +
                                       " share by share");
            std::vector<float> values(inputs), again(inputs);
            for (size_t r = 0; r < rows; r++) {  // a row's values do not depend on where it lies
                decode_row(f.format, tiles.data(), r, inputs, 1.0f, values.data());
                std::vector<uint8_t> alone(f.row_tile_bytes(inputs));
                repack(f.format, file.data() + r * row, 1, inputs, alone.data(), 0, 1);
                decode_row(f.format, alone.data(), 0, inputs, 1.0f, again.data());
                check(std::memcmp(values.data(), again.data(), inputs * sizeof(float)) == 0,
                      "row " + std::to_string(r) + " of tiles");
            }
        }
    }
}

// ---- pools

void check_stages() {
    constexpr size_t kStages = 300;
    for (size_t threads : {1, 2, 3, 16}) {
        ThreadPool pool(threads);
        std::vector<int> times(kStages * threads);  // plain memory: a second thread at one share,
                                                    // or a stage too early, is a race
        for (int run = 0; run < 20; run++) {
            const auto work = [&](size_t stage, size_t share) {
                for (size_t i = 0; stage > 0 && i < threads; i++)
                    if (times[(stage - 1) * threads + i] != run + 1)
                        throw std::logic_error("a stage began too early");
                if ((stage * 7 + share * 3 + static_cast<size_t>(run)) % 97 ==
                    0)  // long enough that the others sleep
                    std::this_thread::sleep_for(std::chrono::microseconds(200));
                times[stage * threads + share]++;
            };
            pool.run([] { return kStages; }, work);
        }
        bool once = true;
        for (int n : times) once = once && n == 20;
        check(once, "every share once, on " + std::to_string(threads) + " threads");

        size_t after = 0;
        throws<std::out_of_range>("what a share throws", [&] {
            pool.run([] { return kStages; },
                     [&](size_t stage, size_t share) {
                         if (stage == 5 && share == threads - 1) throw std::out_of_range("");
                         if (stage > 5) after++;
                     });
        });
        check(after == 0, "nothing is done after what has failed");
        size_t stages = 0;
        pool.run([] { return kStages; },
                 [&](size_t, size_t share) {
                     if (share == 0) stages++;
                 });
        check(stages == kStages, "a run after one that failed");
        pool.run([] { return size_t{0}; }, [](size_t, size_t) { std::abort(); });
    }
}

void check_pools(const Kernels *kernels) {
    throws<std::invalid_argument>("a pool of no threads", [] { ThreadPool pool(0); });
    throws<std::invalid_argument>("a pool of too many threads",
                                  [] { ThreadPool pool(ThreadPool::kMaxThreads + 1); });

    auto pool = std::make_shared<ThreadPool>(3);
    const Layer layer(*pool, 0);
    Program first = new_program(kernels, pool, layer), second = new_program(kernels, pool, layer);
    const std::vector<float> measure = Step(0, 50).run(first);
    bool same[2] = {true, true};
    const auto use = [&](Program &program, bool &good) {
        for (int i = 0; i < 20; i++) good = good && Step(0, 50).run(program) == measure;
    };
    std::thread other([&] { use(second, same[1]); });
    use(first, same[0]);
    other.join();
    check(same[0] && same[1], "two threads of the process on one pool");
    throws<std::bad_alloc>("what cannot be prepared", [&] {
        pool->run([]() -> size_t { throw std::bad_alloc(); }, [](size_t, size_t) { std::abort(); });
    });
    check(Step(0, 50).run(first) == measure, "a run after one that could not be prepared");

#ifndef __SANITIZE_THREAD__  // which cannot follow a child's new threads
    const pid_t child = fork();
    if (child == 0) {
        alarm(60);
        _exit(Step(0, 50).run(first) == measure ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child after fork()");
    check(Step(0, 50).run(first) == measure, "its parent");
#endif
}

}  // namespace

int main() {
    check_tiles();
    check_stages();
    return for_usable_kernels([](const Kernels *k) {
        check_bits(k);
        check_refusals(k);
        check_pools(k);
    });
}
