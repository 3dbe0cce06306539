// How the threads of a pool wait for each other: see thread_pool.h.
#include "thread_pool.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace pellucid {
namespace {

// A pause is 40–140 cycles on x86: some 20 µs of spinning, longer than a barrier of threads that all run, shorter than a time slice.
constexpr int kSpins = 600;
constexpr int kYields = 60;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void ThreadPool::wait(const std::atomic<uint32_t> &word, uint32_t seen) {
    for (int i = 0; i < kSpins; i++) {
        if (word.load(std::memory_order_acquire) != seen) return;
        pause();
    }
    for (int i = 0; i < kYields; i++) {
        if (word.load(std::memory_order_acquire) != seen) return;
        std::this_thread::yield();
    }
    while (word.load(std::memory_order_acquire) == seen) word.wait(seen, std::memory_order_acquire);
}

ThreadPool::ThreadPool(size_t threads) : size_(threads) {
    for (size_t i = 1; i < threads; i++) threads_.emplace_back(&ThreadPool::worker, this, i);
}

ThreadPool::~ThreadPool() {
    stop_.store(true, std::memory_order_relaxed);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    for (std::thread &t : threads_) t.join();
}

void ThreadPool::worker(size_t thread) {
    for (uint32_t seen = 0;;) {
        wait(epoch_, seen);
        seen++;
        if (stop_.load(std::memory_order_relaxed)) return;
        (*work_)(thread);
        barrier();
    }
}

void ThreadPool::run(const std::function<void(size_t)> &work) {
    if (size_ == 1) return work(0);
    work_ = &work;
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    work(0);
    barrier();
}

void ThreadPool::barrier() {
    if (size_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.fetch_add(1, std::memory_order_release);
        phase_.notify_all();
        return;
    }
    wait(phase_, phase);
}

}  // namespace pellucid
