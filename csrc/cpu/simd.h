// A small vector type: the kernels are written once over it and compiled for each instruction set.
//
// Simd<T, W> loads W elements stored as T and computes in float (T = float, bfloat16) or double. It is a GCC
// vector: arithmetic is the language's own, and a * b + c contracts to a fused multiply-add where the machine
// has one. The width is the narrowest that holds a row of K (with_width): a row of K = 4 then costs four
// lanes of square root and division, not sixteen. Everything is in an anonymous namespace: otherwise the
// linker might keep the AVX-512 copy of an inline function for every machine.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace hyperfast {
namespace {

struct bfloat16 {
  uint16_t bits;
};

template <class T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <class T, class C>
inline T narrow(C x) {
  if constexpr (std::is_same_v<T, bfloat16>) {  // round to nearest even, NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return bfloat16{uint16_t((bits >> 16) | 0x40)};
    return bfloat16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return T(x);
  }
}

template <class C, int W>
struct VectorOf {
  typedef C type __attribute__((vector_size(W * sizeof(C))));
};
template <class C>
struct VectorOf<C, 1> {
  typedef C type;
};

// Sum of the lanes by halves: the order is fixed.
template <class C, int W, size_t... I>
inline C sum_halves(typename VectorOf<C, W>::type v, std::index_sequence<I...>);

template <class C, int W>
inline C sum_lanes(typename VectorOf<C, W>::type v) {
  if constexpr (W == 1) return v;
  else if constexpr (W == 2) return v[0] + v[1];
  else return sum_halves<C, W>(v, std::make_index_sequence<W / 2>());
}

template <class C, int W, size_t... I>
inline C sum_halves(typename VectorOf<C, W>::type v, std::index_sequence<I...>) {
  return sum_lanes<C, W / 2>(__builtin_shufflevector(v, v, I...) +
                             __builtin_shufflevector(v, v, (W / 2 + I)...));
}

// AddressSanitizer does not see masked loads and stores: this shows it the bytes.
inline void show_to_sanitizer([[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  for (size_t i = 0; i < bytes; ++i) (void)static_cast<const volatile char*>(p)[i];
#endif
}

template <class T, int W>
struct Simd {
  using C = compute_t<T>;
  using V = typename VectorOf<C, W>::type;
  static constexpr int width = W;

  static V load(const T* p) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      if constexpr (W == 1) {
        return widen(*p);
      } else {
        typename VectorOf<uint16_t, W>::type half;
        std::memcpy(&half, p, sizeof(half));
        auto bits = __builtin_convertvector(half, typename VectorOf<uint32_t, W>::type) << 16;
        V v;
        std::memcpy(&v, &bits, sizeof(v));
        return v;
      }
    } else {
      V v;
      std::memcpy(&v, p, sizeof(v));
      return v;
    }
  }

  static void store(T* p, V v) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      if constexpr (W == 1) {
        *p = narrow<T>(v);
      } else {
        typename VectorOf<uint32_t, W>::type bits;
        std::memcpy(&bits, &v, sizeof(v));
        const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const auto nan = (bits >> 16) | 0x40;
        const auto out =
            __builtin_convertvector(v != v ? nan : rounded, typename VectorOf<uint16_t, W>::type);
        std::memcpy(p, &out, sizeof(out));
      }
    } else {
      std::memcpy(p, &v, sizeof(v));
    }
  }

  // The first n < W lanes; the others are zero.
  static V load(const T* p, int n) {
    show_to_sanitizer(p, n * sizeof(T));
#if defined(__AVX512VL__)
    if constexpr (std::is_same_v<T, bfloat16> && W >= 4) {
      uint16_t lanes[16];
      _mm256_storeu_si256((__m256i*)lanes, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
      return load(reinterpret_cast<const T*>(lanes));
    }
    if constexpr (std::is_same_v<T, float> && W == 16)
      return (V)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    if constexpr (std::is_same_v<T, float> && W == 8)
      return (V)_mm256_maskz_loadu_ps(__mmask8((1u << n) - 1), p);
    if constexpr (std::is_same_v<T, float> && W == 4)
      return (V)_mm_maskz_loadu_ps(__mmask8((1u << n) - 1), p);
    if constexpr (std::is_same_v<T, double> && W == 8)
      return (V)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
    if constexpr (std::is_same_v<T, double> && W == 4)
      return (V)_mm256_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
#endif
    T lanes[W] = {};
    for (int i = 0; i < W; ++i)
      if (i < n) lanes[i] = p[i];
    return load(lanes);
  }

  static void store(T* p, V v, int n) {
    show_to_sanitizer(p, n * sizeof(T));
#if defined(__AVX512VL__)
    if constexpr (std::is_same_v<T, float> && W == 16)
      return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
    if constexpr (std::is_same_v<T, float> && W == 8)
      return _mm256_mask_storeu_ps(p, __mmask8((1u << n) - 1), (__m256)v);
    if constexpr (std::is_same_v<T, float> && W == 4)
      return _mm_mask_storeu_ps(p, __mmask8((1u << n) - 1), (__m128)v);
    if constexpr (std::is_same_v<T, double> && W == 8)
      return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
    if constexpr (std::is_same_v<T, double> && W == 4)
      return _mm256_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m256d)v);
#endif
    T lanes[W];
    store(lanes, v);
    for (int i = 0; i < W; ++i)
      if (i < n) p[i] = lanes[i];
  }

  // Past the caches, for what is not read again soon; p on a multiple of the vector's bytes. A thread that
  // streams ends with stream_fence.
  static void stream(T* p, V v) {
#if defined(__AVX512F__)
    if constexpr (W * sizeof(T) == 64) {
      alignas(64) T lanes[W];
      store(lanes, v);
      return _mm512_stream_si512((__m512i*)p, _mm512_load_si512(lanes));
    }
#endif
#if defined(__AVX2__)
    if constexpr (W * sizeof(T) == 32) {
      alignas(32) T lanes[W];
      store(lanes, v);
      return _mm256_stream_si256((__m256i*)p, _mm256_load_si256((const __m256i*)lanes));
    }
#endif
    store(p, v);
  }

  static V sqrt(V v) {
    if constexpr (W == 1) return std::sqrt(v);
#if defined(__AVX512F__)
    else if constexpr (sizeof(V) == 64 && sizeof(C) == 4)
      return (V)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)v);
    else if constexpr (sizeof(V) == 64) return (V)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)v);
#endif
#if defined(__AVX2__)
    else if constexpr (sizeof(V) == 32 && sizeof(C) == 4) return (V)_mm256_sqrt_ps((__m256)v);
    else if constexpr (sizeof(V) == 32) return (V)_mm256_sqrt_pd((__m256d)v);
    else if constexpr (sizeof(V) == 16 && sizeof(C) == 4) return (V)_mm_sqrt_ps((__m128)v);
    else if constexpr (sizeof(V) == 16) return (V)_mm_sqrt_pd((__m128d)v);
#endif
  }

  // sqrt and a / b to about 1e-7, without the units that compute one at a time; v >= 0, and 0 counts as 1e-37
  static V fast_sqrt(V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(C) == 4) {
      v = v > 1e-37f ? v : V{} + 1e-37f;
      const V r = (V)_mm512_maskz_rsqrt14_ps(__mmask16(-1), (__m512)v), root = v * r;
      return root + 0.5f * r * (v - root * root);
    } else
#endif
      return sqrt(v);
  }

  static V fast_divide(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(C) == 4) {
      const V r = (V)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)b);
      return a * (r * (2.0f - b * r));
    } else
#endif
      return a / b;
  }

  static C sum(V v) { return sum_lanes<C, W>(v); }
};

// Asks for a cache line that this core will write: it need not wait for another core or memory then. (GCC
// makes that of __builtin_prefetch only for processors that promise to have it; others take it for no
// operation.)
inline void prefetch_to_write(void* p) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<char*>(p)));
#else
  __builtin_prefetch(p, 1);
#endif
}

// What this thread has streamed is seen before what it stores from here on.
inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Calls f(Simd<T, W>()) with the narrowest width that holds a row of K elements, or the widest there is.
template <class T, class F>
inline void with_width(int64_t K, F f) {
  constexpr int lanes = sizeof(compute_t<T>) == 4 ? 2 : 1;  // widths count in units of one double
#if defined(__AVX512F__)
  if (K > 4 * lanes) return f(Simd<T, 8 * lanes>());
#endif
#if defined(__AVX2__)
  if (K > 2 * lanes) return f(Simd<T, 4 * lanes>());
  return f(Simd<T, 2 * lanes>());
#else
  (void)K, (void)lanes;
  return f(Simd<T, 1>());
#endif
}

}  // namespace
}  // namespace hyperfast
