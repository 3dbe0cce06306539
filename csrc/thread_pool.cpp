// How the threads of a pool wait for each other: see thread_pool.h.
#include "thread_pool.h"

#include <unistd.h>

#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

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

// Wait while `word` holds `seen`.
void wait(const std::atomic<uint32_t> &word, uint32_t seen) {
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

std::mutex renewing;  // of teams after a fork: held for no longer than it takes to start threads

}  // namespace

struct ThreadPool::Team {
    explicit Team(size_t size) : size(size) {
        try {
            for (size_t i = 1; i < size; i++) threads.emplace_back(&Team::worker, this, i);
        } catch (...) {  // the machine gives no more threads
            end();
            throw;
        }
    }
    ~Team() { end(); }

    void end() {
        stop.store(true, std::memory_order_relaxed);
        epoch.fetch_add(1, std::memory_order_release);
        epoch.notify_all();
        for (std::thread &t : threads) t.join();
    }

    void worker(size_t thread) {
        for (uint32_t seen = 0;;) {
            wait(epoch, seen);
            seen++;
            if (stop.load(std::memory_order_relaxed)) return;
            (*work)(thread);
            barrier();
        }
    }

    void run(const std::function<void(size_t)> &what) {
        work = &what;
        epoch.fetch_add(1, std::memory_order_release);
        epoch.notify_all();
        what(0);
        barrier();
    }

    void barrier() {
        const uint32_t seen = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            phase.fetch_add(1, std::memory_order_release);
            phase.notify_all();
            return;
        }
        wait(phase, seen);
    }

    const size_t size;
    std::mutex turn;  // held by the run that is on
    const std::function<void(size_t)> *work = nullptr;
    alignas(64) std::atomic<uint32_t> epoch{0};    // rises when there is work, or the end
    alignas(64) std::atomic<uint32_t> arrived{0};  // threads at the current barrier
    alignas(64) std::atomic<uint32_t> phase{0};    // rises when a barrier opens
    std::atomic<bool> stop{false};
    std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(size_t threads) : size_(threads), process_(static_cast<int>(getpid())) {
    if (threads < 1 || threads > kMaxThreads) throw std::invalid_argument("a pool has 1 to 256 threads");
    team_ = std::make_unique<Team>(threads);
}

ThreadPool::~ThreadPool() {
    if (process_ != static_cast<int>(getpid())) static_cast<void>(team_.release());  // its threads are another process's
}

ThreadPool::Team &ThreadPool::team() {
    const int process = static_cast<int>(getpid());
    if (process_ != process) {
        const std::lock_guard lock(renewing);
        if (process_ != process) {
            auto fresh = std::make_unique<Team>(size_);
            static_cast<void>(team_.release());  // nothing in it can be ended, joined or trusted
            team_ = std::move(fresh);
            process_ = process;
        }
    }
    return *team_;
}

void ThreadPool::run(const std::function<void()> &prepare, const std::function<void(size_t)> &work) {
    Team &own = team();
    const std::lock_guard lock(own.turn);
    prepare();
    if (size_ == 1)
        work(0);
    else
        own.run(work);
}

void ThreadPool::barrier() {
    if (size_ > 1) team_->barrier();
}

}  // namespace pellucid
