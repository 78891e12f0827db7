// Optimizer states in bfloat16 and in 8 bits: a group of rows is decoded to float32 in L1, updated there and
// coded again. hyperfast/states.py describes the formats and is the specification of every bit.
// Measured with AdamW and K = 16 (two cores of a Xeon of model 207): arithmetic, not memory, sets the time.
// In L2 a row takes 13 ns with float32 states, 18 with bfloat16, 22 with 8 bits; from memory the pass
// takes 1.2 and 1.25 times that of float32 states, which moves twice the bytes of 8 bits.
#pragma once
#include <algorithm>

#include "blocks.h"

namespace hyperfast {
namespace {

constexpr int64_t kSlice = 1024;  // elements decoded at a time: they stay in L1 until they are coded again

template <int W>
struct Lanes {  // of uint32, beside Simd<float, W>
  using V = typename Simd<float, W>::V;
  using U = typename VectorOf<uint32_t, W>::type;

  static U bits(V v) {
    U u;
    std::memcpy(&u, &v, sizeof(u));
    return u;
  }
  static V floats(U u) {
    V v;
    std::memcpy(&v, &u, sizeof(v));
    return v;
  }
  static U magnitude(V v) { return bits(v) & 0x7fffffffu; }  // ordered as |v| is
  static U max(U a, U b) { return a > b ? a : b; }

  // The first n codes; the other lanes are zero.
  template <class Code>
  static U load(const Code* p, int n = W) {
    if (n == W) return widened(p);
    Code lanes[W] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return widened(lanes);
  }

  template <class Code>
  static void store(Code* p, U u, int n = W) {
    const auto codes = narrowed<Code>(u);
    if (n == W) {
      std::memcpy(p, &codes, sizeof(codes));
    } else {
      Code lanes[W];
      std::memcpy(lanes, &codes, sizeof(codes));
      for (int i = 0; i < n; ++i) p[i] = lanes[i];
    }
  }

  // What gcc 12 makes of converting sixteen lanes takes several steps, hence the intrinsics.
  template <class Code>
  static U widened(const Code* p) {
    typename VectorOf<Code, W>::type codes;
    std::memcpy(&codes, p, sizeof(codes));
#if defined(__AVX512F__)
    if constexpr (W == 16 && sizeof(Code) == 1) return (U)_mm512_cvtepu8_epi32((__m128i)codes);
    else if constexpr (W == 16 && sizeof(Code) == 2) return (U)_mm512_cvtepu16_epi32((__m256i)codes);
    else
#endif
        if constexpr (W == 1)
      return codes;
    else return __builtin_convertvector(codes, U);
  }

  template <class Code>
  static auto narrowed(U u) {
#if defined(__AVX512F__)
    if constexpr (W == 16 && sizeof(Code) == 1) return _mm512_cvtepi32_epi8((__m512i)u);
    else if constexpr (W == 16 && sizeof(Code) == 2) return _mm512_cvtepi32_epi16((__m512i)u);
    else
#endif
        if constexpr (W == 1)
      return Code(u);
    else return __builtin_convertvector(u, typename VectorOf<Code, W>::type);
  }

  // of the lanes, as a float
  static float largest(U u) {
    if constexpr (W == 1) {
      return floats(u);
    } else {
      typename Lanes<W / 2>::U halves[2];
      std::memcpy(halves, &u, sizeof(u));
      return Lanes<W / 2>::largest(Lanes<W / 2>::max(halves[0], halves[1]));
    }
  }

  // 32 random bits for each of the elements from `first` on, and a seed that is random itself: a Weyl
  // sequence, mixed once
  static U random(uint32_t seed, uint32_t first) {
    constexpr uint32_t golden = 0x9e3779b9u;
    uint32_t lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = golden * uint32_t(i);
    U x;
    std::memcpy(&x, lanes, sizeof(x));
    x += golden * first + seed;
    x ^= x >> 16;
    x *= 0x21f0aaadu;
    return x ^ (x >> 15);
  }
};

// Formats: code -> value, and value -> code, rounded by the part of 32 random bits that the format takes.
// What is above the bits of a code is cut off when it is stored.
struct BFloat16Low {
  using Code = uint16_t;
  static constexpr bool scaled = false;
  static constexpr float top = 1;
  template <class L>
  static auto decode(typename L::U code, float) {
    return L::floats(code << 16);
  }
  template <class L>
  static auto encode(typename L::V x, float, typename L::U random) {
    return (L::bits(x) + (random & 0xffffu)) >> 16;
  }
};

struct BFloat16High : BFloat16Low {
  template <class L>
  static auto encode(typename L::V x, float, typename L::U random) {
    return (L::bits(x) + (random >> 16)) >> 16;
  }
};

struct Signed8 {  // sign, 4 bits of exponent, 3 of fraction; spaced evenly towards an exact zero
  using Code = uint8_t;
  static constexpr bool scaled = true;
  static constexpr uint32_t offset = 0x38000000;  // bits of 2^-15
  static constexpr float shift = 0x1p-15f, top = 1.875f - shift;
  template <class L>
  static auto decode(typename L::U code, float scale) {
    const auto magnitude = L::floats(((code << 20) & 0x07f00000u) + offset) * scale - shift * scale;
    return L::floats(L::bits(magnitude) | ((code << 24) & 0x80000000u));
  }
  template <class L>
  static auto encode(typename L::V x, float inverse, typename L::U random) {
    const auto magnitude = L::bits(L::floats(L::magnitude(x)) * inverse + shift);
    return (((magnitude + ((random << 8) & 0xfffffu)) >> 20) & 0x7fu) | ((L::bits(x) >> 24) & ~0x7fu);
  }
};

struct Unsigned8 {  // 5 bits of exponent, 3 of fraction, no zero: what is smaller counts as 2^-31
  using Code = uint8_t;
  static constexpr bool scaled = true;
  static constexpr uint32_t offset = 0x30000000;  // bits of 2^-31; the lowest eight above bit 20 are zero
  static constexpr float top = 1.875f;
  template <class L>
  static auto decode(typename L::U code, float scale) {
    return L::floats((code << 20) + offset) * scale;
  }
  template <class L>
  static auto encode(typename L::V x, float inverse, typename L::U random) {
    return (L::max(L::bits(x * inverse), typename L::U{} + offset) + (random >> 12)) >> 20;
  }
};

// What of a state is decoded at a time: `rows` rows of K elements from `row` on, their scales.
struct Slice {
  int64_t row, rows, K;
  int64_t group() const { return rows_per_scale(K) * K; }  // elements that share a scale
  int64_t count() const { return rows * K; }
};

// The slice as floats; there is room for whole vectors behind them.
template <class Format, int W>
void decode(Simd<float, W>, const State& state, const Slice& slice, float* values) {
  using L = Lanes<W>;
  using Code = typename Format::Code;
  const Code* codes = static_cast<const Code*>(state.values) + slice.row * slice.K;
  const float* scales = Format::scaled ? state.scales + slice.row / rows_per_scale(slice.K) : nullptr;
  for (int64_t first = 0; first < slice.count(); first += slice.group()) {
    const int64_t end = std::min(first + slice.group(), slice.count());
    const float scale = Format::scaled ? *scales++ : 1;
    int64_t i = first;
    for (; i + W <= end; i += W) {
      prefetch_ahead<1>(codes + i, 1);
      Simd<float, W>::store(values + i, Format::template decode<L>(L::load(codes + i), scale));
    }
    if (i < end)
      Simd<float, W>::store(values + i, Format::template decode<L>(L::load(codes + i, int(end - i)), scale));
  }
}

template <int W>
float largest_magnitude(Simd<float, W>, const float* values, int64_t count) {
  using S = Simd<float, W>;
  using L = Lanes<W>;
  typename L::U largest{};
  int64_t i = 0;
  for (; i + W <= count; i += W) largest = L::max(L::magnitude(S::load(values + i)), largest);
  if (i < count) largest = L::max(L::magnitude(S::load(values + i, int(count - i))), largest);
  return L::largest(largest);
}

// The way back; the scale takes the largest value to the largest code. random: 32 bits for each element.
template <class Format, int W>
void encode(Simd<float, W> simd, const float* values, const State& state, const Slice& slice,
            const uint32_t* random) {
  using S = Simd<float, W>;
  using L = Lanes<W>;
  using Code = typename Format::Code;
  Code* codes = static_cast<Code*>(state.values) + slice.row * slice.K;
  float* scales = Format::scaled ? state.scales + slice.row / rows_per_scale(slice.K) : nullptr;
  for (int64_t first = 0; first < slice.count(); first += slice.group()) {
    const int64_t end = std::min(first + slice.group(), slice.count());
    float inverse = 1;
    if constexpr (Format::scaled) {
      const float largest = largest_magnitude(simd, values + first, end - first);
      const bool normal = largest > 1e-36f;  // smaller ones count as zero: their inverse would overflow
      *scales++ = normal ? largest * (1 / Format::top) : 0;
      inverse = normal ? Format::top * (1 - 0x1p-22f) / largest : 0;  // rounding up stays within the codes
    }
    const auto code = [&](int64_t i) {
      return Format::template encode<L>(S::load(values + i), inverse, L::load(random + i));
    };
    int64_t i = first;
    for (; i + W <= end; i += W) L::store(codes + i, code(i));
    if (i < end) L::store(codes + i, code(i), int(end - i));
  }
}

template <int W>
void fill_random(Simd<float, W>, uint32_t seed, uint32_t first, int64_t count, uint32_t* random) {
  using L = Lanes<W>;
  for (int64_t i = 0; i < count; i += W) L::store(random + i, L::random(seed, first + uint32_t(i)));
}

}  // namespace
}  // namespace hyperfast
