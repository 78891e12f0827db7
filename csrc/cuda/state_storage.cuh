// Optimizer states in bfloat16 and in 8 bits, decoded to float32 in registers and coded again;
// hyperfast/states.py describes the formats and is the specification of every bit (so nothing is contracted
// to a fused multiply-add).
#pragma once

#include "rows.cuh"

namespace hyperfast::cuda {
namespace {

// Rows that share one scale of 8-bit states: at most 256 elements, or one row.
__host__ __device__ inline int rows_per_scale(int K) {
  int rows = 32;
  while (rows > 1 && rows * K > 256) rows /= 2;
  return rows;
}

// 32 random bits for element `index`, and a seed that is random itself: a Weyl sequence, mixed once.
__device__ __forceinline__ uint32_t random_bits(uint32_t seed, uint32_t index) {
  uint32_t x = 0x9e3779b9u * index + seed;
  x ^= x >> 16;
  x *= 0x21f0aaadu;
  return x ^ (x >> 15);
}

__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Formats: code -> value, and value -> code, rounded by the part of 32 random bits that the format takes.
template <class T>
struct Plain {
  using Code = T;
  static constexpr bool scaled = false;
  static __device__ __forceinline__ compute_t<T> decode(T code, float) {
    return static_cast<compute_t<T>>(code);
  }
  static __device__ __forceinline__ T encode(compute_t<T> x, float, uint32_t) { return static_cast<T>(x); }
};

template <int shift>  // of the random bits that count
struct BFloat16 {
  using Code = uint16_t;
  static constexpr bool scaled = false;
  static __device__ __forceinline__ float decode(Code code, float) {
    return __uint_as_float(static_cast<uint32_t>(code) << 16);
  }
  static __device__ __forceinline__ Code encode(float x, float, uint32_t random) {
    return static_cast<Code>((__float_as_uint(x) + (random >> shift & 0xffffu)) >> 16);
  }
};

struct Signed8 {  // sign, 4 bits of exponent, 3 of fraction; spaced evenly towards an exact zero
  using Code = uint8_t;
  static constexpr bool scaled = true;
  static constexpr uint32_t offset = 0x38000000;  // bits of 2^-15
  static constexpr float shift = 0x1p-15f, top = 1.875f - shift;
  static __device__ __forceinline__ float decode(Code code, float scale) {
    const uint32_t c = code;
    const float shifted = __fmul_rn(__uint_as_float(((c << 20) & 0x07f00000u) + offset), scale);
    const float value = __fsub_rn(shifted, __fmul_rn(shift, scale));
    return __uint_as_float(__float_as_uint(value) | ((c << 24) & 0x80000000u));
  }
  static __device__ __forceinline__ Code encode(float x, float inverse, uint32_t random) {
    const uint32_t y = __float_as_uint(__fadd_rn(__fmul_rn(fabsf(x), inverse), shift));
    return static_cast<Code>((((y + ((random << 8) & 0xfffffu)) >> 20) & 0x7fu) |
                             ((__float_as_uint(x) >> 24) & 0x80u));
  }
};

struct Unsigned8 {  // 5 bits of exponent, 3 of fraction, no zero: what is smaller counts as 2^-31
  using Code = uint8_t;
  static constexpr bool scaled = true;
  static constexpr uint32_t offset = 0x30000000;  // bits of 2^-31; the lowest eight above bit 20 are zero
  static constexpr float top = 1.875f;
  static __device__ __forceinline__ float decode(Code code, float scale) {
    return __uint_as_float((static_cast<uint32_t>(code) << 20) + offset) * scale;
  }
  static __device__ __forceinline__ Code encode(float x, float inverse, uint32_t random) {
    const uint32_t y = __float_as_uint(x * inverse);
    return static_cast<Code>(((y > offset ? y : offset) + (random >> 12)) >> 20);
  }
};

// The format of state j.
template <class T, Storage storage, int j>
struct FormatOf {
  using type = Plain<T>;
};
template <>
struct FormatOf<float, Storage::bfloat16, 0> {
  using type = BFloat16<0>;
};
template <>
struct FormatOf<float, Storage::bfloat16, 1> {
  using type = BFloat16<16>;
};
template <>
struct FormatOf<float, Storage::eight_bit, 0> {
  using type = Signed8;
};
template <>
struct FormatOf<float, Storage::eight_bit, 1> {
  using type = Unsigned8;
};

// The scale of a group whose largest magnitude has these bits, and what its values are multiplied by. Smaller
// groups count as zero: their inverse would overflow. Rounding up stays within the codes.
struct Scale {
  float scale, inverse;
};
template <class Format>
__device__ __forceinline__ Scale scale_of(uint32_t largest_bits) {
  const float largest = __uint_as_float(largest_bits);
  if (!(largest > 1e-36f)) return {0, 0};
  return {largest * (1 / Format::top), Format::top * (1 - 0x1p-22f) / largest};
}

}  // namespace
}  // namespace hyperfast::cuda
