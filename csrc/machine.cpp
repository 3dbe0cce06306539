// Times the two loops of kernels/ceilings.inc on all threads of a pool.
//
// One idea: the best of several tries is the machine, the others are its neighbours. A try is made long enough (some milliseconds) that
// starting the threads does not count, and all threads run the whole try, so that they share what they share.
#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "program.h"

namespace pellucid {
namespace {

constexpr int kTries = 5;
constexpr size_t kGranule = 1024;  // a thread's part of a working set is a multiple: 8 vectors of any width

// Units per second of `work(share, repeats)`, run so often that a try takes `seconds / kTries`.
template <class F>
double best_rate(ThreadPool &pool, double seconds, double units, F work) {
    using Clock = std::chrono::steady_clock;
    const auto time = [&](size_t repeats) {
        const auto start = Clock::now();
        pool.run([] { return size_t{1}; }, [&](size_t, size_t share) { work(share, repeats); });
        return std::chrono::duration<double>(Clock::now() - start).count();
    };
    size_t repeats = 1;
    for (double once = time(1); once < seconds / kTries / 4; once = time(repeats)) repeats *= 2;
    repeats *= 2;
    double best = time(repeats);
    for (int i = 1; i < kTries; i++) best = std::min(best, time(repeats));
    return units * static_cast<double>(repeats) / best;
}

}  // namespace

double measure_read_bandwidth(const Kernels &kernels, ThreadPool &pool, size_t bytes, double seconds) {
    const size_t part = std::max(bytes / pool.size() / kGranule, size_t{1}) * kGranule;
    const Memory memory = allocate(part * pool.size());
    std::memset(memory.get(), 1, part * pool.size());  // untouched pages would all be one page of zeros, which lies in the cache
    std::atomic<uint32_t> sink{0};
    double best = 0;
    for (const size_t ahead : {size_t{0}, size_t{1024}, size_t{8192}}) {
        const double rate = best_rate(pool, seconds / 3, static_cast<double>(part * pool.size()), [&](size_t share, size_t repeats) {
            uint32_t all = 0;
            for (size_t i = 0; i < repeats; i++) all |= kernels.read_bytes(memory.get() + share * part, part, ahead);
            sink.fetch_or(all, std::memory_order_relaxed);
        });
        best = std::max(best, rate);
    }
    return best;
}

double measure_int8_peak(const Kernels &kernels, ThreadPool &pool, double seconds) {
    const Memory operands = allocate(1024);
    for (size_t i = 0; i < 1024; i++) operands.get()[i] = static_cast<uint8_t>(i % 7);
    std::atomic<int32_t> sink{0};
    int32_t ignored = 0;
    constexpr size_t rounds = 1000;
    const double multiply_adds = static_cast<double>(kernels.multiply_bytes(operands.get(), rounds, &ignored) * pool.size());
    return best_rate(pool, seconds, 2 * multiply_adds, [&](size_t, size_t repeats) {
        int32_t all = 0, one;
        for (size_t i = 0; i < repeats; i++) {
            kernels.multiply_bytes(operands.get(), rounds, &one);
            all ^= one;
        }
        sink.fetch_xor(all, std::memory_order_relaxed);
    });
}

}  // namespace pellucid
