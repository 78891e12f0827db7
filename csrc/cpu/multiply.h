// The register-blocked matrix product that kernels share.
#pragma once
#include "kernels.h"
#include "simd.h"

namespace hyperfast {
namespace {

// sum_q a(p, q) b[q, j] for P rows of J vectors held in registers; finish(p, j, sums) gets a vector of them
template <int P, int J, class C, int W, class Finish>
inline void outer_rows(Simd<C, W>, const C* a, int64_t ap, int64_t aq, const C* b, int64_t ldb, int64_t Q,
                       Finish finish) {
  using S = Simd<C, W>;
  typename S::V acc[P][J] = {};
  for (int64_t q = 0; q < Q; ++q) {
    typename S::V bs[J];
    for (int j = 0; j < J; ++j) bs[j] = S::load(b + q * ldb + j * W);
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < J; ++j) acc[p][j] += a[p * ap + q * aq] * bs[j];
  }
#pragma GCC unroll 8
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) finish(p, j * W, acc[p][j]);
}

// The same for any numbers of rows and columns, these a multiple of W; a(p, q) = a[p ap + q aq]. 64 x 64 by
// 64 x 64 in cache, float32, one core: 168 GFLOPS with AVX-512 (torch.mm of 2048 x 2048 by 2048 x 2048: 164),
// 78 with AVX2.
template <class C, int W, class Finish>
void multiply(Simd<C, W> simd, int64_t rows, int64_t columns, const C* a, int64_t ap, int64_t aq, const C* b,
              int64_t ldb, int64_t Q, Finish finish) {
  constexpr int P = sizeof(C) * W == 64 ? 8 : 6;
  const auto strip = [&](auto vectors, int64_t j) {
    constexpr int J = decltype(vectors)::value;
    int64_t p = 0;
    const auto block = [&](auto held) {
      constexpr int H = decltype(held)::value;
      for (; p + H <= rows; p += H)
        outer_rows<H, J>(simd, a + p * ap, ap, aq, b + j, ldb, Q,
                         [&](int64_t q, int64_t i, auto sums) { finish(p + q, j + i, sums); });
    };
    block(std::integral_constant<int, P>());
    block(std::integral_constant<int, P / 2>());
    block(std::integral_constant<int, 1>());
  };
  int64_t j = 0;
  for (; j + 2 * W <= columns; j += 2 * W) strip(std::integral_constant<int, 2>(), j);
  for (; j < columns; j += W) strip(std::integral_constant<int, 1>(), j);
}

// c[p, j] (+)= sum_q a(p, q) b[q, j]; columns a multiple of kColumnPad
template <class C>
void multiply_add(C* c, int64_t ldc, int64_t rows, int64_t columns, const C* a, int64_t ap, int64_t aq,
                  const C* b, int64_t ldb, int64_t Q, bool add) {
  with_width<C>(kMaxK, [&](auto simd) {
    multiply(simd, rows, columns, a, ap, aq, b, ldb, Q, [&](int64_t p, int64_t j, auto sums) {
      C* to = c + p * ldc + j;
      simd.store(to, add ? simd.load(to) + sums : sums);
    });
  });
}

}  // namespace
}  // namespace hyperfast
