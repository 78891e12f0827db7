// Products a[rows, K] b[K, columns] with a b that serves many times: packed once into panels of kPanel
// columns, each [K, kPanel] in a row and padded with zeros, so that a product reads memory from end to end.
// Inside a parallel region every thread makes the columns of its own panels: they stay in its cache.
#pragma once
#include "multiply.h"
#include "scratch.h"

namespace hyperfast {

constexpr int64_t kPanel = 32;  // columns; two AVX-512 vectors of float

inline constexpr int64_t count_panels(int64_t columns) { return ceil_div(columns, kPanel); }
// Numbers of all panels.
inline constexpr int64_t packed_size(int64_t K, int64_t columns) {
  return count_panels(columns) * K * kPanel;
}

// What thread `thread` of `threads` does of `count` things.
struct Share {
  int64_t begin, end;
  Share(int64_t count, int64_t thread, int64_t threads)
      : begin(count * thread / threads), end(count * (thread + 1) / threads) {}
};

namespace {

// Panel `panel` of b[k, j] = from[k ks + j js], K x columns, to its place among all panels.
template <class C>
void pack_panel(const C* from, int64_t ks, int64_t js, int64_t K, int64_t columns, int64_t panel, C* panels) {
  constexpr int64_t held = 16;  // so many k of all columns are in the first cache at once
  C* to = panels + panel * K * kPanel;
  from += panel * kPanel * js;
  const int64_t width = columns - panel * kPanel < kPanel ? columns - panel * kPanel : kPanel;
  for (int64_t first = 0; first < K; first += held) {
    const int64_t end = first + held < K ? first + held : K;
    if (ks == 1) {
      for (int64_t j = 0; j < width; ++j)
        for (int64_t k = first; k < end; ++k) to[k * kPanel + j] = from[j * js + k];
    } else {
      for (int64_t k = first; k < end; ++k)
        for (int64_t j = 0; j < width; ++j) to[k * kPanel + j] = from[k * ks + j * js];
    }
    for (int64_t k = first; k < end; ++k)
      for (int64_t j = width; j < kPanel; ++j) to[k * kPanel + j] = 0;
  }
}

// The product of `rows` rows of a with panel `panel`: finish(row, column, sums, lanes) gets vectors of sums,
// column counted from the first panel's, of which the first `lanes` are columns.
template <class C, int W, class Finish>
void multiply_panel(Simd<C, W> simd, int64_t rows, const C* a, int64_t lda, const C* panels, int64_t K,
                    int64_t columns, int64_t panel, Finish finish) {
  const int64_t first = panel * kPanel, left = columns - first;
  const int64_t width = left < kPanel ? round_up(left, W) : kPanel;
  multiply(simd, rows, width, a, lda, int64_t(1), panels + panel * K * kPanel, kPanel, K,
           [&](int64_t row, int64_t j, auto sums) {
             finish(row, first + j, sums, int(left - j < W ? left - j : W));
           });
}

}  // namespace
}  // namespace hyperfast
