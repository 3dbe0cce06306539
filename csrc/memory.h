// Memory for weights, caches and buffers: aligned, zeroed, in huge pages where it is large.
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

// No allocation is larger, so that sums and products of sizes cannot overflow.
constexpr size_t kMostBytes = size_t{1} << 46;

// Zeroed memory, aligned to 64 bytes, with room behind it for prefetches. Large memory is aligned
// to 2 MiB, with a hint for huge pages; its pages are taken when they are first touched, so a cache
// costs only what is used of it.
Memory allocate(size_t bytes);

// Memory for one model's weights. A decoded token reads all of them in the order in which they were
// loaded. A small matrix in ordinary pages costs that stream a walk of the page tables every 4 KiB,
// so small matrices share slabs of huge pages.
class WeightMemory {
  public:
    // As allocate(); a slab lives as long as one of its weights. Several threads may call it.
    std::shared_ptr<uint8_t> take(size_t bytes);

  private:
    std::mutex turn_;
    std::shared_ptr<uint8_t> slab_;
    size_t used_ = 0;
};

}  // namespace pellucid
