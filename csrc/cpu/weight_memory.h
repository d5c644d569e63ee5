// Memory for weights and for what a model remembers: large pages, because a step streams through all of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace helexa {

// `nbytes` of memory at a 64-byte boundary. Small pieces lie side by side in slabs that ask for huge pages, big ones in
// a slab of their own; a slab is given back with the last of its pieces. Only what is touched becomes resident, in
// steps of 2 MiB. Thread-safe; throws std::bad_alloc.
std::shared_ptr<uint8_t> allocate_weights(size_t nbytes);

// `nbytes` of zeros at a 2 MiB boundary, every page of them resident on return: the kernel clears them, huge where it
// can, on all threads. Given back with the last owner. Throws std::bad_alloc.
std::shared_ptr<uint8_t> allocate_zeroed(size_t nbytes);

// Maps the pages under `nbytes` from `start` in one go, which costs less than a fault for every few of them. A hint:
// where the system refuses it, they are mapped as they are touched.
void populate_pages(const void* start, size_t nbytes);

}  // namespace helexa
