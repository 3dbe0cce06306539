// A team of threads that run one function together and meet at barriers inside it.
//
// One idea: a step of decoding passes hundreds of barriers in two milliseconds, so waiting must cost no system call while everybody is
// running, and must give the core away when somebody is not. A waiter spins for some microseconds, then yields, then sleeps on a futex
// (std::atomic::wait). Nothing here spins for ever.
//
// The caller is thread 0. Not reentrant: one run at a time. After fork() the child has no threads; it must make a pool of its own.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace pellucid {

class ThreadPool {
  public:
    explicit ThreadPool(size_t threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    size_t size() const { return size_; }

    // Run work(thread) on every thread, the caller among them, and return when all are done. `work` must not throw.
    void run(const std::function<void(size_t)> &work);

    // Inside a run: wait until every thread is here.
    void barrier();

  private:
    void worker(size_t thread);

    // Wait while `word` holds `seen`.
    static void wait(const std::atomic<uint32_t> &word, uint32_t seen);

    size_t size_;
    const std::function<void(size_t)> *work_ = nullptr;
    alignas(64) std::atomic<uint32_t> epoch_{0};    // rises when there is work, or the end
    alignas(64) std::atomic<uint32_t> arrived_{0};  // threads at the current barrier
    alignas(64) std::atomic<uint32_t> phase_{0};    // rises when a barrier opens
    std::atomic<bool> stop_{false};
    std::vector<std::thread> threads_;
};

}  // namespace pellucid
