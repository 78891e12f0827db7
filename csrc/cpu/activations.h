// exp, sigmoid and tanh of vectors, to 3e-7 (float) and 5e-16 (double) of the value at most where exp is not
// cut off; NaN stays NaN. sigmoid goes no lower than at -87 (float, 1.6e-38) or -708 (double, 3.3e-308), so
// that of -infinity is not 0, and times infinity it is infinite.
#pragma once
#include "simd.h"

namespace hyperfast {
namespace {

// exp(x) = scale (1 + p) with scale = 2^n and p = exp(r) - 1, |r| <= ln 2 / 2, by its Taylor series. Between
// -87 and 87 (float) or -708 and 708; beyond, x counts as the nearer end.
template <class C, int W>
struct Exponential {
  using V = typename Simd<C, W>::V;
  V scale, p;
  explicit Exponential(V x) {
    constexpr bool single = sizeof(C) == 4;
    using Bits = typename VectorOf<std::conditional_t<single, uint32_t, uint64_t>, W>::type;
    constexpr C limit = single ? C(87) : C(708), log2e = C(1.44269504088896340736);
    // ln 2 in two parts, of which n times the first is exact
    constexpr C ln2 = single ? C(0.693359375) : C(6.93147180369123816490e-01);
    constexpr C ln2_rest = single ? C(-2.12194440054690583e-4) : C(1.90821492927058770002e-10);
    // added to a number it leaves the nearest integer in the lowest bits
    constexpr C magic = single ? C(12582912) : C(6755399441055744);
    constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023, terms = single ? 7 : 13;
    x = x > limit ? V{} + limit : x;
    x = x < -limit ? V{} - limit : x;
    const V shifted = x * log2e + magic, n = shifted - magic;
    const V r = (x - n * ln2) - n * ln2_rest;
    C factorial = 1;
    for (int k = 2; k <= terms; ++k) factorial *= C(k);
    p = V{} + 1 / factorial;
    for (int k = terms; k > 1; --k) {
      factorial /= C(k);
      p = p * r + 1 / factorial;
    }
    p = p * r;
    Bits bits;
    std::memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits + bias) << mantissa;
    std::memcpy(&scale, &bits, sizeof(bits));
  }
};

template <class C, int W>
inline typename Simd<C, W>::V sigmoid(Simd<C, W>, typename Simd<C, W>::V x) {
  const Exponential<C, W> e(-x);
  return Simd<C, W>::fast_divide(typename Simd<C, W>::V{} + C(1), e.scale * e.p + (e.scale + C(1)));
}

// (exp(2x) - 1) / (exp(2x) + 1), without the cancellation near 0
template <class C, int W>
inline typename Simd<C, W>::V tanh(Simd<C, W>, typename Simd<C, W>::V x) {
  using V = typename Simd<C, W>::V;
  const V limit = V{} + C(sizeof(C) == 4 ? 10 : 20);  // from here on it is 1
  x = x > limit ? limit : x;
  const Exponential<C, W> e(x + x);
  const V less = e.scale * e.p + (e.scale - C(1));
  return Simd<C, W>::fast_divide(less, less + C(2));
}

}  // namespace
}  // namespace hyperfast
