// Memory for weights: large pages, because a decode step streams through all of it once a token.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace helexa {

// `nbytes` of memory at a 64-byte boundary. Small pieces lie side by side in slabs that ask for huge pages, big ones in
// a slab of their own; a slab is given back with the last of its pieces. Only what is touched becomes resident, in
// steps of 2 MiB. Thread-safe; throws std::bad_alloc.
std::shared_ptr<uint8_t> allocate_weights(size_t nbytes);

}  // namespace helexa
