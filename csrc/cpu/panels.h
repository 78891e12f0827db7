// Products a[rows, K] b[K, columns] with a b that serves many times: packed once into panels of kPanel
// columns, each [K, kPanel] in a row and padded with zeros, so that a product reads memory from end to end.
// Inside a parallel region every thread makes the columns of its own panels: they stay in its cache.
#pragma once
#include "rows.h"
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

// to [K, kPanel] = b[k, j] = from[k ks + j js] for `width` columns j, zero in the others
template <class C>
void pack_columns(const C* from, int64_t ks, int64_t js, int64_t K, int64_t width, C* to) {
  constexpr int64_t held = 16;  // so many k of all columns are in the first cache at once
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

// The columns of panel `panel` among `columns`.
inline int64_t panel_width(int64_t columns, int64_t panel) {
  const int64_t left = columns - panel * kPanel;
  return left < kPanel ? left : kPanel;
}

// Panel `panel` of b[k, j] = from[k ks + j js], K x columns, to its place among all panels.
template <class C>
void pack_panel(const C* from, int64_t ks, int64_t js, int64_t K, int64_t columns, int64_t panel, C* panels) {
  pack_columns(from + panel * kPanel * js, ks, js, K, panel_width(columns, panel),
               panels + panel * K * kPanel);
}

// acc[P][J] += a[P, K] panel[K, J vectors]; asks for `lines` cache lines of what comes next on the way
template <int P, int J, class C, int W, class Sums>
inline void add_products(Simd<C, W>, const C* a, int64_t lda, const C* panel, int64_t K, const C* next,
                         int64_t lines, Sums& acc) {
  using S = Simd<C, W>;
  const auto step = [&](int64_t k) {
    typename S::V b[J];
    for (int j = 0; j < J; ++j) b[j] = S::load(panel + k * kPanel + j * W);
    for (int p = 0; p < P; ++p)
      for (int j = 0; j < J; ++j) acc[p][j] += a[p * lda + k] * b[j];
  };
  int64_t k = 0;
  for (; k < lines; ++k) {
    __builtin_prefetch(next + k * (64 / sizeof(C)), 0, 2);
    step(k);
  }
  for (; k < K; ++k) step(k);
}

// A left factor [rows, K], rows lda apart.
template <class C>
struct Factor {
  const C* a;
  int64_t lda, K;
};

// The product of `rows` rows with one panel: finish(row, column, sums) gets vectors of sums until they hold
// `width` columns. The factors' columns count one after the other along the panel. It is walked in blocks
// that stay in the first cache while all rows pass; meanwhile the block after is fetched, which for the last
// one is at `next`.
template <class C, int W, size_t Factors, class Finish>
void multiply_panel(Simd<C, W> simd, int64_t rows, const Factor<C> (&factors)[Factors], const C* panel,
                    int64_t width, const C* next, Finish finish) {
  using S = Simd<C, W>;
  constexpr int64_t held_k = 1024 / sizeof(C), held_rows = 128, line = 64 / sizeof(C);
  constexpr int P = sizeof(C) * W == 64 ? 8 : 6;
  alignas(64) C tile[held_rows * kPanel];
  for (int64_t first = 0; first < rows; first += held_rows) {
    const int64_t end = first + held_rows < rows ? first + held_rows : rows,
                  blocks = ceil_div(end - first, P);
    const C* b = panel;
    for (size_t f = 0; f < Factors; ++f)
      for (int64_t k = 0; k < factors[f].K; k += held_k) {
        const int64_t lda = factors[f].lda, K = factors[f].K - k < held_k ? factors[f].K - k : held_k;
        const C* a = factors[f].a + k;
        const bool starts = f == 0 && k == 0, ends = f + 1 == Factors && k + K == factors[f].K;
        const C* after = ends ? next : b + K * kPanel;
        const int64_t wanted = ceil_div(held_k * kPanel / line, blocks), lines = wanted < K ? wanted : K;
        int64_t row = first;
        const auto held = [&](auto count, auto vectors, int64_t j, int64_t asked) {
          constexpr int H = decltype(count)::value, J = decltype(vectors)::value;
          typename S::V acc[H][J] = {};
          C* sums = tile + (row - first) * kPanel + j;
          if (!starts)
            for (int p = 0; p < H; ++p)
              for (int i = 0; i < J; ++i) acc[p][i] = S::load(sums + p * kPanel + i * W);
          add_products<H, J>(simd, a + row * lda, lda, b + j, K, after + (row - first) / P * lines * line,
                             asked, acc);
#pragma GCC unroll 8
          for (int p = 0; p < H; ++p)
#pragma GCC unroll 2
            for (int i = 0; i < J; ++i)
              if (ends) finish(row + p, j + i * W, acc[p][i]);
              else S::store(sums + p * kPanel + i * W, acc[p][i]);
        };
        const auto strip = [&](auto count) {
          for (; row + count <= end; row += count) {
            int64_t j = 0;
            for (; j + 2 * W <= width; j += 2 * W)
              held(count, std::integral_constant<int, 2>(), j, j == 0 ? lines : 0);
            for (; j < width; j += W) held(count, std::integral_constant<int, 1>(), j, 0);
          }
        };
        strip(std::integral_constant<int, P>());
        strip(std::integral_constant<int, P / 2>());
        strip(std::integral_constant<int, 1>());
        b += K * kPanel;
      }
  }
}

// The product of `rows` rows of a with panel `panel` of b [K, columns]: finish(row, column, sums, lanes) gets
// vectors of sums, column counted from the first panel's, of which the first `lanes` are columns.
template <class C, int W, class Finish>
void multiply_panel(Simd<C, W> simd, int64_t rows, const C* a, int64_t lda, const C* panels, int64_t K,
                    int64_t columns, int64_t panel, Finish finish) {
  const int64_t first = panel * kPanel, real = panel_width(columns, panel);
  const Factor<C> factors[1] = {{a, lda, K}};
  const C* from = panels + panel * K * kPanel;
  multiply_panel(simd, rows, factors, from, real, from + K * kPanel, [&](int64_t row, int64_t j, auto sums) {
    finish(row, first + j, sums, int(real - j < W ? real - j : W));
  });
}

// A left factor [rows, K], rows lda apart, and the right one as [columns, K] or wider, rows ldb apart.
template <class C>
struct DotFactor {
  const C* a;
  int64_t lda;
  const C* b;
  int64_t ldb, K;
};

// The same product from a b that is not packed, column by column: finish(row, column, sums). For few rows,
// where packing would cost more than it saves.
template <class C, int W, size_t Factors, class Finish>
void multiply_columns(Simd<C, W>, int64_t rows, const DotFactor<C> (&factors)[Factors], int64_t width,
                      Finish finish) {
  using S = Simd<C, W>;
  const auto dot = [&](auto count, int64_t row, int64_t j, typename S::V* acc) {
    for (const DotFactor<C>& f : factors) {
      const C *a = f.a + row * f.lda, *b = f.b + j * f.ldb;
      int64_t k = 0;
      for (; k + W <= f.K; k += W)
        for (int i = 0; i < count; ++i) acc[i] += S::load(a + k) * S::load(b + i * f.ldb + k);
      if (k < f.K)
        for (int i = 0; i < count; ++i)
          acc[i] += S::load(a + k, int(f.K - k)) * S::load(b + i * f.ldb + k, int(f.K - k));
    }
  };
  int64_t j = 0;
  for (; j + W <= width; j += W)
    for (int64_t row = 0; row < rows; ++row) {
      typename S::V acc[W] = {};
      dot(std::integral_constant<int, W>(), row, j, acc);
      sum_groups<W, W, W>(acc);
      finish(row, j, acc[0]);
    }
  for (int64_t row = 0; j < width && row < rows; ++row) {
    C sums[W] = {};
    for (int64_t i = j; i < width; ++i) {
      typename S::V acc[1] = {};
      dot(std::integral_constant<int, 1>(), row, i, acc);
      sums[i - j] = S::sum(acc[0]);
    }
    finish(row, j, S::load(sums));
  }
}

}  // namespace
}  // namespace hyperfast
