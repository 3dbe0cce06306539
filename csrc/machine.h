// Measures this machine's ceilings, with which the speed of kernels is compared.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "memory.h"
#include "thread_pool.h"

namespace pellucid {

// Memory that is read repeatedly, to measure the bandwidth.
class ReadBuffer {
  public:
    // Allocates at least `bytes`; each thread of the pool touches its part.
    ReadBuffer(ThreadPool &pool, size_t bytes);

    // Bytes per second that the pool's threads read together, each its part of the first `bytes`,
    // over and over for about `seconds`: the best of several tries, with and without prefetching.
    double read(const Kernels &kernels, ThreadPool &pool, size_t bytes, double seconds) const;

  private:
    size_t bytes_;
    Memory memory_;
};

// Seconds of one barrier of the pool: the mean over stages without work.
double measure_barrier(ThreadPool &pool, size_t stages);

// Operations per second (a multiply-add is two) on bytes, summed in 32 bits, from registers and L1:
// the best of several tries.
double measure_int8_peak(const Kernels &kernels, ThreadPool &pool, double seconds);

// The same on float32.
double measure_float_peak(const Kernels &kernels, ThreadPool &pool, double seconds);

}  // namespace pellucid
