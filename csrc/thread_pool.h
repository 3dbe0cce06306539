// A team of threads that run one function together and meet at barriers inside it.
//
// One idea: a step of decoding passes hundreds of barriers in two milliseconds, so waiting must cost no system call while everybody is
// running, and must give the core away when somebody is not. A waiter spins for some microseconds, then yields, then sleeps on a futex
// (std::atomic::wait). Nothing here spins for ever.
//
// The caller is thread 0. Runs from several threads of the process take turns. fork() copies the caller alone: in the child, the first run
// makes a new team, and the old one is left as it lies.
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

    size_t size() const { return size_; }

    // Run prepare() alone, then work(thread) on every thread, the caller among them, and return when all are done. What `prepare` throws
    // is thrown before any work is begun; `work` must not throw.
    void run(const std::function<void()> &prepare, const std::function<void(size_t)> &work);

    // Inside a run: wait until every thread is here.
    void barrier();

  private:
    struct Team;

    Team &team();  // that of this process

    size_t size_;
    std::unique_ptr<Team> team_;
    std::atomic<int> process_;  // whose threads the team's are
};

}  // namespace pellucid
