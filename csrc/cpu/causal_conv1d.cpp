// Depthwise causal convolution: checks, the cut into pieces, and the choice of the instruction-set level.
#include "causal_conv1d.h"

#include <algorithm>

#include "check.h"
#include "cpu_features.h"
#include "thread_pool.h"

namespace helexa {
namespace {

constexpr const char* kName = "causal_conv1d";

}  // namespace

void causal_conv1d(const CausalConv1d& args) {
  check(args.taps >= 2 && args.taps <= kMaxConvTaps, kName, "weight", "2 to 8 taps", args.taps);
  check(args.channels > 0, kName, "x", "at least one channel", args.channels);
  check(args.x_stride >= args.channels, kName, "x", "rows at least as far apart as they are wide", args.x_stride);
  if (args.sequences.num_sequences == 0 && args.sequences.num_tokens == 0) return;
  check_packed_sequences(kName, args.sequences);
  const ConvKernels& level = HELEXA_AT_LEVEL(kConv);
  const int64_t pieces = (args.channels + kConvChannels - 1) / kConvChannels;
  constexpr int64_t kPiecesPerRange = 8;  // a decode step of a small model stays on few threads
  const int64_t grain = args.sequences.num_tokens > 4 * args.sequences.num_sequences ? 1 : kPiecesPerRange;
  parallel_for(args.sequences.num_sequences * pieces, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kConvChannels;
      level.convolve(args, i / pieces, first, int(std::min<int64_t>(kConvChannels, args.channels - first)));
    }
  });
}

}  // namespace helexa
