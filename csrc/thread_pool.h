// A team of threads that run one list of stages together: no stage begins before the one before it
// is done.
//
// One idea: a step of decoding has hundreds of stages in three milliseconds, and nobody tells the
// threads when one of them has lost its core. So a stage is one share for each thread, but a share
// belongs to nobody until it is begun: a thread begins its own first, and then those of threads
// that are not there. A thread without a core holds up at most the one share that it had begun, and
// threads for which there is no core do no harm.
//
// Who finds nothing to do spins for some microseconds, and then sleeps in the kernel, which hands
// the core over. Nothing spins for ever.
//
// The caller is thread 0. Runs from several threads of the process take turns. fork() copies the
// caller alone: in the child, the first run makes a new team, and the old one is left as it lies.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace pellucid {

class ThreadPool {
  public:
    static constexpr size_t kMaxThreads = 256;

    // Throws std::invalid_argument unless 1 <= threads <= kMaxThreads.
    explicit ThreadPool(size_t threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    size_t size() const { return size_; }  // threads, and shares of a stage

    // Run prepare() alone, which says how many stages there are; then work(stage, share) for every
    // share of stage 0, of stage 1 and so on, and return when all are done. What `prepare` throws
    // is thrown before any work is begun; where `work` throws, the rest of it is left out, and the
    // first exception is thrown here when no thread works any more.
    void run(const std::function<size_t()> &prepare,
             const std::function<void(size_t, size_t)> &work);

  private:
    struct Team;

    Team &team();  // that of this process

    size_t size_;
    std::unique_ptr<Team> team_;
    std::atomic<int> process_;  // whose threads the team's are
};

}  // namespace pellucid
