// The first word of Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) for the masks of recurrent dropout,
// as hyperfast.reference.philox; counters count columns.
#pragma once
#include "../lstm_arguments.h"
#include "simd.h"

namespace hyperfast {
namespace {

// Products of the lower 32 bits of 64-bit lanes; the upper halves may hold anything.
template <int W>
struct Lanes64 {
  using V = typename VectorOf<uint64_t, W>::type;
  static V product(V a, uint32_t b) {
#if defined(__AVX512F__)
    if constexpr (W == 8) return (V)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)a, _mm512_set1_epi64(b));
#endif
#if defined(__AVX2__)
    if constexpr (W == 4) return (V)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
    if constexpr (W == 2) return (V)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#endif
    return (a & 0xffffffffu) * b;
  }
};

// Words of columns column .. column + W - 1 in the lower halves.
template <int W>
typename Lanes64<W>::V philox(uint64_t key, uint32_t row, uint32_t stream, uint32_t column) {
  using L = Lanes64<W>;
  using V = typename L::V;
  V c0{}, c1 = V{} + row, c2 = V{} + stream, c3{};
  uint64_t columns[W];
  for (int i = 0; i < W; ++i) columns[i] = column + uint32_t(i);
  std::memcpy(&c0, columns, sizeof(c0));
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const V low = L::product(c0, 0xD2511F53u), high = L::product(c2, 0xCD9E8D57u);
    c0 = (high >> 32) ^ c1 ^ k0, c1 = high;
    c2 = (low >> 32) ^ c3 ^ k1, c3 = low;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

// What recurrent dropout multiplies by: 0 or 1 / (1 - share), as hyperfast.reference.dropout_scale.
template <class C>
struct DropoutScale {
  uint64_t key;
  uint32_t threshold, stream, first_row;
  C kept;
  DropoutScale(const LstmDropout& dropout, uint32_t stream)
      : key(dropout.key ? uint64_t(*dropout.key) : 0),
        threshold(uint32_t(dropout.share * 4294967296.0)),
        stream(stream),
        first_row(uint32_t(dropout.first_row)),
        kept(C(1 / (1 - dropout.share))) {}

  // of columns column .. column + W - 1
  template <int W>
  typename Simd<C, W>::V at(Simd<C, W>, int64_t row, int64_t column) const {
    constexpr int half = sizeof(C) == 4 && W > 1 ? W / 2 : W;  // 64-bit lanes are half as many as floats
    uint64_t words[W];
    for (int i = 0; i < W; i += half) {
      const auto made = philox<half>(key, first_row + uint32_t(row), stream, uint32_t(column + i));
      std::memcpy(words + i, &made, sizeof(made));
    }
    C scales[W];
    for (int i = 0; i < W; ++i) scales[i] = uint32_t(words[i]) >= threshold ? kept : C(0);
    return Simd<C, W>::load(scales);
  }
};

}  // namespace
}  // namespace hyperfast
