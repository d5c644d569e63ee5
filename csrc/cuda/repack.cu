// A file's blocks to planes and back. A thread moves 16 neighbouring bytes of one row of one plane. On the side of the
// blocks it moves single bytes, since a block is aligned to nothing; a block's lines are shared by neighbouring threads
// in the first cache, and this runs once a load, at many times the speed at which bytes come to the device.
#include "common.cuh"
#include "quant_planes.h"
#include "repack.h"

namespace helexa::cuda {
namespace {

constexpr int kThreads = 256, kPiece = 16;

// One plane's part of a matrix; `blocks` are those of row 0, `plane` its row 0.
struct PlaneRows {
  int64_t rows, row_bytes;
  int pitch, blocks_in_row, block_bytes;
  Field field;
};

template <bool kToPlane, class Blocks, class Plane>
__global__ void __launch_bounds__(kThreads) move_plane(Blocks* blocks, Plane* plane, PlaneRows shape) {
  const int pieces = shape.pitch / kPiece;
  const int64_t piece = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = piece / pieces;
  if (row >= shape.rows) return;
  const int first = int(piece % pieces) * kPiece, used = shape.blocks_in_row * shape.field.bytes;
  int block = first / shape.field.bytes, within = first % shape.field.bytes;
  using Bytes = Vector<uint8_t, kPiece>;
  Plane* const at = plane + row * shape.pitch + first;
  Bytes bytes;
  if constexpr (!kToPlane) bytes = load_global<Bytes>(at);
#pragma unroll
  for (int i = 0; i < kPiece; ++i) {
    Blocks* const byte =
        blocks + row * shape.row_bytes + int64_t(block) * shape.block_bytes + shape.field.offset + within;
    const bool real = first + i < used;
    if constexpr (kToPlane) {
      bytes[i] = real ? *byte : uint8_t(0);
    } else {
      if (real) *byte = bytes[i];
    }
    if (++within == shape.field.bytes) within = 0, ++block;
  }
  if constexpr (kToPlane) store_global(at, bytes);
}

template <bool kToPlane, class Blocks, class Plane>
void move_planes(const char* name, int quant_type, Blocks* blocks, Plane* planes, int64_t first_row, int64_t num_rows,
                 int64_t rows, int64_t cols, Stream stream) {
  const BlockFields block = check_planes(name, quant_type, rows, cols);
  check(first_row >= 0, name, "first_row", "at least 0", first_row);
  if (num_rows < 0 || num_rows > rows - first_row)
    fail(name, "num_rows", "0 to " + std::to_string(rows - first_row), std::to_string(num_rows));
  if (num_rows == 0) return;
  const PlanesLayout layout = planes_layout(static_cast<QuantType>(quant_type), rows, cols);
  const int64_t blocks_in_row = cols / block.block_size;
  for (int i = 0; i < block.count; ++i) {
    const PlaneRows shape = {
        num_rows,       blocks_in_row * block.block_bytes, int(layout.pitch[i]), int(blocks_in_row), block.block_bytes,
        block.fields[i]};
    const int64_t pieces = num_rows * layout.pitch[i] / kPiece;
    launch<move_plane<kToPlane, Blocks, Plane>>(name, dim3(unsigned((pieces + kThreads - 1) / kThreads)), kThreads, 0,
                                                stream, blocks, planes + layout.offset[i] + first_row * layout.pitch[i],
                                                shape);
  }
}

}  // namespace

int64_t planes_bytes(int quant_type, int64_t rows, int64_t cols) {
  check_planes("planes_bytes", quant_type, rows, cols);
  return planes_layout(static_cast<QuantType>(quant_type), rows, cols).bytes;
}

void repack_planes(int quant_type, const void* source, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
                   void* planes, Stream stream) {
  move_planes<true>("repack_planes", quant_type, static_cast<const uint8_t*>(source), static_cast<uint8_t*>(planes),
                    first_row, num_rows, rows, cols, stream);
}

void unpack_planes(int quant_type, const void* planes, int64_t first_row, int64_t num_rows, int64_t rows, int64_t cols,
                   void* out, Stream stream) {
  move_planes<false>("unpack_planes", quant_type, static_cast<uint8_t*>(out), static_cast<const uint8_t*>(planes),
                     first_row, num_rows, rows, cols, stream);
}

}  // namespace helexa::cuda
