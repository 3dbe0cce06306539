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

constexpr size_t kMostBytes =
    size_t{1}
    << 46;  // no allocation is larger: so that what is computed from sizes cannot overflow

// Zeroed, aligned to 64 bytes (2 MiB where it is large, with a hint for huge pages), and with room
// behind it for loads that run ahead. What is large takes memory where it is first touched, not
// before: a cache costs what is used of it.
Memory allocate(size_t bytes);

// Memory for one model's weights. One idea: a decoded token reads them all, in the order in which
// they were loaded, and a small matrix in pages of its own costs that stream a walk of the page
// tables every 4 KiB; so small ones share slabs of huge pages.
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
