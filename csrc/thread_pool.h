// A team of threads that run one list of stages together, with a barrier after each stage.
//
// A step of decode has hundreds of stages in three milliseconds, and the system may take a core
// away in any of them. So shares are claimed dynamically: a stage has one share for each thread,
// each thread claims its own first, then steals unclaimed ones. A thread that loses its core delays
// at most the one share that it has claimed. More threads than cores cost little.
//
// A thread without work spins for some microseconds, then sleeps in the kernel, which gives its
// core to others.
//
// The caller is thread 0. Runs from several threads of the process take turns. fork() copies the
// caller alone, so the first run in a child makes a new team and abandons the old one.
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

    // Call prepare(), which returns the number of stages. Then call work(stage, share) for every
    // share of stage 0, of stage 1 and so on, and return when all are done. An exception of
    // `prepare` is passed on before any work begins. After an exception of `work` the remaining
    // shares are skipped, and the first exception is passed on once all threads have stopped.
    void run(const std::function<size_t()> &prepare,
             const std::function<void(size_t, size_t)> &work);

  private:
    struct Team;

    Team &team();  // of this process

    size_t size_;
    std::unique_ptr<Team> team_;
    std::atomic<int> process_;  // to which the threads of the team belong
};

}  // namespace pellucid
