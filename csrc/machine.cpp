// Times the loops of kernels/ceilings.inc on all threads of a pool.
//
// The best of several tries counts, because other programs disturb the rest. All threads run during
// the whole try, so they share caches and bandwidth as they do in a step.
#include "machine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <iterator>
#include <stdexcept>

#include "program.h"

namespace pellucid {
namespace {

constexpr int kTries = 5;
constexpr size_t kGranule = 1024;  // a thread's part is a multiple of it: 8 vectors of any width

// Units per second of `work(share, repeats)`: the best try in about `seconds`. The number of
// repeats grows until a try is so long that starting the threads does not matter.
template <class F>
double best_rate(ThreadPool &pool, double seconds, double units, F work) {
    using Clock = std::chrono::steady_clock;
    double best = 0, all = 0;
    for (size_t repeats = 1; all < seconds;) {
        const auto start = Clock::now();
        pool.run([] { return size_t{1}; }, [&](size_t, size_t share) { work(share, repeats); });
        const double taken = std::chrono::duration<double>(Clock::now() - start).count();
        best = std::max(best, units * static_cast<double>(repeats) / taken);
        all += taken;
        if (taken < seconds / kTries) repeats *= 2;
    }
    return best;
}

constexpr size_t kOperandBytes = 1024, kRounds = 1000;

// Operations per second of `multiply`, which stores a sum of its products and returns the number of
// multiply-adds.
template <class T, class F>
double best_product_rate(ThreadPool &pool, double seconds, F multiply) {
    std::atomic<T> sink{0};
    T ignored = 0;
    const double operations = 2.0 * static_cast<double>(multiply(&ignored) * pool.size());
    return best_rate(pool, seconds, operations, [&](size_t, size_t repeats) {
        T all = 0, one;
        for (size_t i = 0; i < repeats; i++) {
            multiply(&one);
            all += one;
        }
        sink.store(all, std::memory_order_relaxed);
    });
}

}  // namespace

ReadBuffer::ReadBuffer(ThreadPool &pool, size_t bytes)
    : bytes_(std::max((bytes + kGranule - 1) / kGranule, pool.size()) * kGranule),
      memory_(allocate(bytes_)) {
    // without this all pages would be the same page of zeros, which lies in the cache
    pool.run([] { return size_t{1}; },
             [&](size_t, size_t share) {
                 const size_t first = bytes_ * share / pool.size(),
                              last = bytes_ * (share + 1) / pool.size();
                 std::memset(memory_.get() + first, 1, last - first);
             });
}

double ReadBuffer::read(const Kernels &kernels, ThreadPool &pool, size_t bytes,
                        double seconds) const {
    const size_t granules = std::min(bytes, bytes_) / kGranule,
                 part = std::max(granules / pool.size(), size_t{1}) * kGranule;
    if (part * pool.size() > bytes_) throw std::invalid_argument("more threads than memory");
    std::atomic<uint32_t> sink{0};
    double best = 0;
    for (const size_t ahead : {size_t{0}, size_t{1024}, size_t{8192}}) {
        const double rate =
            best_rate(pool, seconds / 3, static_cast<double>(part * pool.size()),
                      [&](size_t share, size_t repeats) {
                          uint32_t all = 0;
                          for (size_t i = 0; i < repeats; i++)
                              all |= kernels.read_bytes(memory_.get() + share * part, part, ahead);
                          sink.fetch_or(all, std::memory_order_relaxed);
                      });
        best = std::max(best, rate);
    }
    return best;
}

double measure_barrier(ThreadPool &pool, size_t stages) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&] { return stages; }, [](size_t, size_t) {});
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
           static_cast<double>(stages);
}

double measure_int8_peak(const Kernels &kernels, ThreadPool &pool, double seconds) {
    uint8_t operands[kOperandBytes];
    for (size_t i = 0; i < kOperandBytes; i++) operands[i] = static_cast<uint8_t>(i % 7);
    return best_product_rate<int32_t>(pool, seconds, [&](int32_t *sum) {
        return kernels.multiply_bytes(operands, kRounds, sum);
    });
}

double measure_float_peak(const Kernels &kernels, ThreadPool &pool, double seconds) {
    float operands[kOperandBytes / sizeof(float)];
    for (size_t i = 0; i < std::size(operands); i++) operands[i] = static_cast<float>(i % 7) / 8.0f;
    return best_product_rate<float>(
        pool, seconds, [&](float *sum) { return kernels.multiply_floats(operands, kRounds, sum); });
}

}  // namespace pellucid
