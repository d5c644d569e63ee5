#include "weight_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "thread_pool.h"

namespace helexa {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSlab = size_t(64) << 20;
constexpr size_t kOwnSlab = size_t(8) << 20;  // from here on a piece gets memory of its own

#if defined(__linux__) && !defined(MADV_POPULATE_READ)  // of Linux 5.14; older ones refuse them
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

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

std::shared_ptr<uint8_t> allocate_zeroed(size_t nbytes) {
  const size_t size = round_up(std::max<size_t>(nbytes, 1), nbytes < kHugePage ? 4096 : kHugePage);
  void* start = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) throw std::bad_alloc();
  const std::shared_ptr<void> mapping(start, [size](void* p) { munmap(p, size + kHugePage); });
  auto* data = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(start), kHugePage));
#if defined(MADV_HUGEPAGE)
  (void)madvise(data, nbytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  constexpr size_t kPiece = size_t(8) << 20;
  std::atomic<bool> short_of_memory{false};
  parallel_for(int64_t((nbytes + kPiece - 1) / kPiece), 1, [&](int64_t begin, int64_t end, int) {
    uint8_t* first = data + size_t(begin) * kPiece;
    const size_t length = std::min(size_t(end) * kPiece, nbytes) - size_t(begin) * kPiece;
#if defined(MADV_POPULATE_WRITE)
    if (madvise(first, round_up(length, 4096), MADV_POPULATE_WRITE) == 0) return;
    if (errno != EINVAL) {  // that is an older system, which does not know the advice; anything else is no memory
      short_of_memory = true;
      return;
    }
#endif
    for (size_t i = 0; i < length; i += 4096) static_cast<volatile uint8_t*>(first)[i] = 0;
  });
  if (short_of_memory) throw std::bad_alloc();
  return {mapping, data};
}

void populate_pages(const void* start, size_t nbytes) {
#if defined(MADV_POPULATE_READ)
  const auto address = reinterpret_cast<uintptr_t>(start), first = address / 4096 * 4096;
  (void)madvise(reinterpret_cast<void*>(first), round_up(address + nbytes - first, 4096), MADV_POPULATE_READ);
#else
  (void)start, (void)nbytes;
#endif
}

}  // namespace helexa
