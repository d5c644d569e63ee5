// Tiles of 8-bit codes where these and the activations are multiplied as 16-bit words.
// Included by quant_dot_kernels.h, inside its unnamed namespace.

constexpr int kWordVectors = 16;                        // of 32 columns: of each quad the even columns and the odd ones
constexpr int kGroupWords = kWordVectors * 2 * kLanes;  // of 16 rows

template <class L = Lanes>
void widen_codes(const UnpackedGroup* group, int groups, int16_t* words) {
  for (int g = 0; g < groups; ++g) {
    for (int j = 0; j < 8; ++j, words += 4 * kLanes) {
      const B codes = L::load_bytes(group[g].codes + 64 * j);
      L::store_bytes(reinterpret_cast<uint8_t*>(words), L::even_words(codes));
      L::store_bytes(reinterpret_cast<uint8_t*>(words + 2 * kLanes), L::odd_words(codes));
    }
  }
}

template <class Code, int kRows, class L = Lanes>
inline void words_register_tile(const int16_t* words, const UnpackedGroup* w, int groups,
                                const int16_t (*quads)[kChunk], const ActivationChunk* x, float* sums) {
  F total[kRows];
  for (int r = 0; r < kRows; ++r) total[r] = L::load(sums + r * kSumStride);
  for (int g = 0; g < groups; ++g, ++w, words += kGroupWords) {
    for (int r = 0; r < kRows; ++r) L::put_away(total[r]);
    I sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = L::izero();
    for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const B pairs = L::load_bytes(reinterpret_cast<const uint8_t*>(words + (2 * j + odd) * 2 * kLanes));
#pragma GCC unroll Lanes::kUnroll
        for (int r = 0; r < kRows; ++r) {
          const int16_t* two = quads[r] + 32 * g + 16 * odd + 2 * j;
          sum[r] = L::dot_words(sum[r], pairs, L::quad(reinterpret_cast<const int8_t*>(two)));
        }
      }
    }
    const F scale = L::load(w->scale[0]);
#pragma GCC unroll Lanes::kUnroll
    for (int r = 0; r < kRows; ++r) total[r] = accumulate<Code>(total[r], sum[r], scale, L::zero(), x[r], g, 0);
  }
  for (int r = 0; r < kRows; ++r) L::store(sums + r * kSumStride, total[r]);
}

template <class Code, int kRows = Lanes::kTileRows, class L = Lanes>
void words_tile_rows(const int16_t (*words)[kChunkGroups * kGroupWords], const UnpackedGroup* const* w, int count,
                     int groups, const ActivationChunk* x, int rows, float* sums) {
  alignas(64) int16_t quads[kRows][kChunk];
  for (; rows >= kRows; rows -= kRows, x += kRows, sums += kRows * kSumStride) {
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < groups; ++g) L::store_words(quads[r] + 32 * g, x[r].q + 32 * g);
    for (int n = 0; n < count; ++n)
      words_register_tile<Code, kRows>(words[n], w[n], groups, quads, x, sums + n * kLanes);
  }
  if constexpr (kRows > 1) {
    if (rows > 0) words_tile_rows<Code, kRows == 6 ? 4 : kRows / 2>(words, w, count, groups, x, rows, sums);
  }
}

template <class Code, class L = Lanes>
void words_tile(const UnpackedGroup* a, const UnpackedGroup* b, int groups, const ActivationChunk* x, int rows,
                float* sums) {
  alignas(64) int16_t words[2][kChunkGroups * kGroupWords];
  const UnpackedGroup* const w[2] = {a, b};
  const int count = b ? 2 : 1;
  for (int n = 0; n < count; ++n) widen_codes(w[n], groups, words[n]);
  words_tile_rows<Code>(words, w, count, groups, x, rows, sums);
}
