// Memory for weights, caches and buffers: aligned, zeroed, in huge pages if it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>

namespace pellucid {

struct ReleaseMemory {
    size_t mapped = 0;  // bytes that were mapped; 0: from the heap
    void operator()(void *p) const;
};
using Memory = std::unique_ptr<uint8_t, ReleaseMemory>;

// The largest allocation. With this bound, sums and products of sizes cannot overflow.
constexpr size_t kMostBytes = size_t{1} << 46;

// Zeroed memory, aligned to 64 bytes, with extra bytes behind it for prefetches. Large memory is
// aligned to 2 MiB, with a hint for huge pages. The system allocates its pages when they are first
// touched, so unused parts of a cache take no memory.
Memory allocate(size_t bytes);

// Memory for one model's weights. Each step of decode reads all weights in the order in which they
// were loaded. With ordinary pages this stream would walk the page tables every 4 KiB, so small
// matrices share slabs of huge pages.
class WeightMemory {
  public:
    // Like allocate(). A slab is freed with the last of its weights. Several threads may call it.
    std::shared_ptr<uint8_t> take(size_t bytes);

  private:
    std::mutex turn_;
    std::shared_ptr<uint8_t> slab_;
    size_t used_ = 0;
};

}  // namespace pellucid
