// How the threads of a pool share the work and wait for each other: see thread_pool.h.
#include "thread_pool.h"

#include <unistd.h>

#include <exception>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace pellucid {
namespace {

// A pause takes 40–140 cycles on x86, so this is about 20 µs of spinning. That is longer than a
// barrier takes while all threads run, and shorter than a time slice.
constexpr int kSpins = 600;

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// The number of a stage, counted over all runs, with two marks beside it. Threads sleep on it.
class Gate {
  public:
    struct State {
        uint64_t stage;
        bool idle;  // between two runs
    };

    State now() const { return state(word_.load(std::memory_order_acquire)); }

    // Wait until stage `seen` is over. Returns the state that follows it.
    State after(uint64_t seen) {
        for (int i = 0; i < kSpins; i++) {
            if (const State s = now(); s.stage != seen) return s;
            pause();
        }
        for (uint64_t word = word_.load(std::memory_order_acquire);;) {
            if (state(word).stage != seen) return state(word);
            if (!(word & kSleepers) &&
                !word_.compare_exchange_weak(word, word | kSleepers, std::memory_order_acquire))
                continue;
            sleep(word | kSleepers);
            word = word_.load(std::memory_order_acquire);
        }
    }

    void open(uint64_t stage, bool idle) {
        if (word_.exchange(stage << 2 | (idle ? kIdle : 0), std::memory_order_acq_rel) & kSleepers)
            wake();
    }

  private:
    static constexpr uint64_t kSleepers = 1, kIdle = 2;

    static State state(uint64_t word) { return {word >> 2, (word & kIdle) != 0}; }

#if defined(__linux__)  // std::atomic::wait of GCC's library yields before it sleeps, which can
                        // cost a whole time slice
    uint32_t *half() {
        return reinterpret_cast<uint32_t *>(&word_);
    }  // the low one: no big-endian machine has kernels
    void sleep(uint64_t word) {
        syscall(SYS_futex, half(), FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(word), nullptr,
                nullptr, 0);
    }
    void wake() {
        syscall(SYS_futex, half(), FUTEX_WAKE_PRIVATE, static_cast<int>(ThreadPool::kMaxThreads),
                nullptr, nullptr, 0);
    }
#else
    void sleep(uint64_t word) { word_.wait(word, std::memory_order_acquire); }
    void wake() { word_.notify_all(); }
#endif

    std::atomic<uint64_t> word_{kIdle};
};

std::mutex renewing;  // guards the replacement of teams after a fork

}  // namespace

struct ThreadPool::Team {
    explicit Team(size_t size) : begun(size) {
        try {
            for (size_t i = 1; i < size; i++) threads.emplace_back(&Team::worker, this, i);
        } catch (...) {  // the system refuses more threads
            end();
            throw;
        }
    }
    ~Team() { end(); }

    void end() {
        stop.store(true, std::memory_order_relaxed);
        gate.open(gate.now().stage + 1, true);
        for (std::thread &t : threads) t.join();
    }

    void worker(size_t own) {
        for (uint64_t seen = 0;;) {
            const auto [stage, idle] = gate.after(seen);
            if (stop.load(std::memory_order_relaxed)) return;
            if (!idle) help(stage, own);
            seen = stage;
        }
    }

    void run(size_t stages, const std::function<void(size_t, size_t)> &what) {
        work = &what;
        first = gate.now().stage + 1;
        last = first + stages;
        gate.open(first, false);
        for (Gate::State at = gate.now(); !at.idle; at = gate.after(at.stage)) help(at.stage, 0);
        if (failed.exchange(false, std::memory_order_relaxed))
            std::rethrow_exception(std::exchange(error, nullptr));
    }

    // Claim and run unclaimed shares of the stage until none are left, this thread's own first.
    void help(uint64_t stage, size_t own) {
        for (size_t i = 0; i < begun.size(); i++) {
            const size_t share = own + i < begun.size() ? own + i : own + i - begun.size();
            uint64_t before = begun[share].stage.load(std::memory_order_relaxed);
            if (before >= stage || !begun[share].stage.compare_exchange_strong(
                                       before, stage, std::memory_order_relaxed))
                continue;
            // the stage cannot end before this share is done, so the run's variables stay valid
            perform(stage - first, share);
            if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < begun.size()) continue;
            done.store(0, std::memory_order_relaxed);
            gate.open(stage + 1, stage + 1 == last);
        }
    }

    void perform(size_t stage, size_t share) {
        if (failed.load(std::memory_order_relaxed)) return;
        try {
            (*work)(stage, share);
        } catch (...) {
            if (!failed.exchange(true, std::memory_order_relaxed)) error = std::current_exception();
        }
    }

    struct alignas(64) Begun {
        std::atomic<uint64_t> stage{0};  // the last stage in which this share was claimed
    };

    std::mutex turn;  // held by the current run
    const std::function<void(size_t, size_t)> *work = nullptr;
    uint64_t first = 0, last = 0;  // the stages of the run
    std::exception_ptr error;      // the first that `work` threw
    std::atomic<bool> failed{false}, stop{false};
    std::vector<Begun> begun;  // per share
    alignas(64) Gate gate;
    alignas(64) std::atomic<size_t> done{0};  // shares of the stage that are done
    std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(size_t threads) : size_(threads), process_(static_cast<int>(getpid())) {
    if (threads < 1 || threads > kMaxThreads)
        throw std::invalid_argument("a pool has 1 to 256 threads");
    team_ = std::make_unique<Team>(threads);
}

ThreadPool::~ThreadPool() {
    if (process_ != static_cast<int>(getpid()))
        static_cast<void>(team_.release());  // its threads belong to another process
}

ThreadPool::Team &ThreadPool::team() {
    const int process = static_cast<int>(getpid());
    if (process_ != process) {
        const std::lock_guard lock(renewing);
        if (process_ != process) {
            auto fresh = std::make_unique<Team>(size_);
            static_cast<void>(team_.release());  // its threads do not exist in this process
            team_ = std::move(fresh);
            process_ = process;
        }
    }
    return *team_;
}

void ThreadPool::run(const std::function<size_t()> &prepare,
                     const std::function<void(size_t, size_t)> &work) {
    Team &own = team();
    const std::lock_guard lock(own.turn);
    if (const size_t stages = prepare(); stages > 0) own.run(stages, work);
}

}  // namespace pellucid
