// The measured ceilings of this machine: what a kernel's speed is a share of.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "thread_pool.h"

namespace pellucid {

// Bytes per second that the pool's threads read together, each its part of a working set of
// `bytes`, over and over for about `seconds`: the best of several tries, with and without
// prefetching.
double measure_read_bandwidth(const Kernels &kernels, ThreadPool &pool, size_t bytes,
                              double seconds);

// Operations per second (a multiply-add is two) on bytes, summed in 32 bits, from registers and L1:
// the best of several tries.
double measure_int8_peak(const Kernels &kernels, ThreadPool &pool, double seconds);

// The same on float32.
double measure_float_peak(const Kernels &kernels, ThreadPool &pool, double seconds);

}  // namespace pellucid
