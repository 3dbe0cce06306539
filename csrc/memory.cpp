// Memory: see memory.h.
#include "memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace pellucid {
namespace {

constexpr size_t kSlack = 16384;           // kernels prefetch, and never read, so far beyond a matrix
constexpr size_t kHuge = size_t{2} << 20;  // bytes of a huge page
constexpr size_t kSlabBytes = 8 * kHuge - kSlack;

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

void FreeDeleter::operator()(void *p) const { std::free(p); }

Memory allocate(size_t bytes) {
    if (bytes > kMostBytes) throw std::bad_alloc();
    const size_t alignment = bytes >= kHuge ? kHuge : 64;
    const size_t size = rounded_up(bytes + kSlack, alignment);
    void *p = std::aligned_alloc(alignment, size);
    if (p == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (alignment == kHuge) madvise(p, size, MADV_HUGEPAGE);
#endif
    std::memset(p, 0, size);
    return Memory(static_cast<uint8_t *>(p));
}

std::shared_ptr<uint8_t> WeightMemory::take(size_t bytes) {
    if (bytes > kSlabBytes / 4) return allocate(bytes);
    const std::lock_guard lock(turn_);
    if (slab_ == nullptr || used_ + bytes > kSlabBytes) {
        slab_ = allocate(kSlabBytes);
        used_ = 0;
    }
    uint8_t *p = slab_.get() + used_;
    used_ += rounded_up(bytes, 64);
    return {slab_, p};
}

}  // namespace pellucid
