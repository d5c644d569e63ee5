#include "weight_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>

namespace helexa {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSlab = size_t(64) << 20;
constexpr size_t kOwnSlab = size_t(8) << 20;  // from here on a piece gets memory of its own

size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

std::shared_ptr<uint8_t> map(size_t nbytes) {
  const size_t size = round_up(nbytes, kHugePage);
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(kHugePage, size));
  if (!data) throw std::bad_alloc();
  std::shared_ptr<uint8_t> memory(data, std::free);
#if defined(MADV_HUGEPAGE)
  // Not for the end of a big piece, which would make up to 2 MiB resident for nothing. A refusal costs speed only.
  (void)madvise(data, nbytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace

std::shared_ptr<uint8_t> allocate_weights(size_t nbytes) {
  if (nbytes >= kOwnSlab) return map(nbytes);
  static std::mutex mutex;
  static std::weak_ptr<uint8_t> current;  // weak: the pieces alone keep a slab
  static size_t used = 0;
  std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<uint8_t> slab = current.lock();
  const size_t size = round_up(nbytes, 64);
  if (!slab || used + size > kSlab) {
    slab = map(kSlab);
    current = slab, used = 0;
  }
  uint8_t* piece = slab.get() + used;
  used += size;
  return {slab, piece};
}

}  // namespace helexa
