// Memory: see memory.h.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace pellucid {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kSlack = 0;  // so that a read beyond an array is found
#else
constexpr size_t kSlack = 16384;  // kernels prefetch, and never read, so far beyond a matrix
#endif
constexpr size_t kHuge = size_t{2} << 20;  // bytes of a huge page
constexpr size_t kSlabBytes = 8 * kHuge - kSlack;

size_t rounded_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

void ReleaseMemory::operator()(void *p) const {
    if (mapped)
        munmap(p, mapped);
    else
        std::free(p);
}

Memory allocate(size_t bytes) {
    if (bytes > kMostBytes) throw std::bad_alloc();
    if (bytes < kHuge) {
        const size_t size = rounded_up(bytes + kSlack, 64);
        void *p = std::aligned_alloc(64, size);
        if (p == nullptr) throw std::bad_alloc();
        std::memset(p, 0, size);
        return Memory(static_cast<uint8_t *>(p));
    }
    const size_t size = rounded_up(bytes + kSlack, static_cast<size_t>(sysconf(_SC_PAGESIZE)));
    void *whole =
        mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) throw std::bad_alloc();
    uint8_t *p = static_cast<uint8_t *>(whole);
    // unmap the parts before and behind the aligned one
    const size_t before = (kHuge - reinterpret_cast<uintptr_t>(p) % kHuge) % kHuge;
    if (before) munmap(p, before);
    p += before;
    if (before < kHuge) munmap(p + size, kHuge - before);
#ifdef MADV_HUGEPAGE
    madvise(p, size, MADV_HUGEPAGE);
#endif
    return Memory(p, ReleaseMemory{size});
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
