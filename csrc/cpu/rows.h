// What every kernel that reads a generator does with a run of consecutive rows: generate their weights, or
// sum them weighted by a gradient.
#pragma once
#include "blocks.h"

namespace hyperfast {
namespace {

// One vector from u and v, which hold groups of G lanes: the lower (or upper) half of every group of u, then
// of v.
template <int W, int G, bool upper, class V, size_t... I>
inline V halves_of_groups(V u, V v, std::index_sequence<I...>) {
  constexpr int half = G / 2, groups = W / G;
  return __builtin_shufflevector(
      u, v, (I / half / groups * W + I / half % groups * G + (upper ? half : 0) + I % half)...);
}

// Sums inside the groups of G lanes of `Count` vectors; the sums come in order, in as few vectors as hold
// them. Lanes are added by halves as Simd::sum adds them: the same bits for a fraction of the shuffles.
template <int W, int Count, int G, class V>
inline void sum_groups(V* v) {
  if constexpr (G > 1) {
    constexpr std::make_index_sequence<W> lanes{};
    for (int i = 0; i < (Count + 1) / 2; ++i) {
      const V a = v[2 * i], b = v[Count == 1 ? 0 : 2 * i + 1];
      v[i] = halves_of_groups<W, G, false>(a, b, lanes) + halves_of_groups<W, G, true>(a, b, lanes);
    }
    sum_groups<W, (Count + 1) / 2, G / 2>(v);
  }
}

// Rows that are narrower than a vector and divide it: W / K of them in each load. Returns the rows done.
template <int K, class T, int W, class Out>
int64_t generate_packed_rows(Simd<T, W>, const T* weight, const T* bias, const compute_t<T>* z, int64_t rows,
                             Out* w, int64_t ahead) {
  using S = Simd<T, W>;
  using C = compute_t<T>;
  C repeated[W];
  for (int i = 0; i < W; ++i) repeated[i] = z[i % K];
  const auto zs = Simd<C, W>::load(repeated);
  int64_t n = 0;
  for (; n + W <= rows; n += W) {
    const T* from = weight + n * K;
    prefetch_ahead(from, W * K * sizeof(T), ahead);
    typename S::V v[K];
    for (int i = 0; i < K; ++i) v[i] = S::load(from + i * W) * zs;
    sum_groups<W, K, K>(v);
    if (bias) v[0] += S::load(bias + n);
    Simd<Out, W>::store(w + n, v[0]);
  }
  return n;
}

// W rows at a time, so that their sums come out as one vector. Returns the rows done.
template <class T, int W, class Out>
int64_t generate_whole_vectors(Simd<T, W>, const T* weight, const T* bias, const compute_t<T>* z, int64_t K,
                               int64_t rows, Out* w, int64_t ahead) {
  using S = Simd<T, W>;
  using Z = Simd<compute_t<T>, W>;
  const int64_t whole = K / W * W;
  const int tail = int(K - whole);
  int64_t n = 0;
  for (; n + W <= rows; n += W) {
    const T* from = weight + n * K;
    prefetch_ahead(from, W * K * sizeof(T), ahead);
    typename S::V acc[W] = {};
    for (int64_t k = 0; k < whole; k += W)
      for (int r = 0; r < W; ++r) acc[r] += S::load(from + r * K + k) * Z::load(z + k);
    if (tail)
      for (int r = 0; r < W; ++r) acc[r] += S::load(from + r * K + whole, tail) * Z::load(z + whole);
    sum_groups<W, W, W>(acc);
    if (bias) acc[0] += S::load(bias + n);
    Simd<Out, W>::store(w + n, acc[0]);
  }
  return n;
}

// Rows of bfloat16 in pairs: a vector of 2 W of them is W even elements (shifted left) and W odd ones
// (masked), no shuffles. K a multiple of 2 W, or a power of two below it and then several rows in each
// vector; G: lanes of a row in a vector. The sums are added in another order than elsewhere. Returns the rows
// done.
template <int G, int W>
int64_t generate_pairs(Simd<bfloat16, W>, const bfloat16* weight, const bfloat16* bias, const float* z,
                       int64_t K, int64_t rows, float* w, int64_t ahead) {
  using S = Simd<float, W>;
  using Bits = typename VectorOf<uint32_t, W>::type;
  const int64_t step = K < 2 * W ? 2 * W : K;  // elements from one vector's first to the next's
  float even[kMaxK / 2], odd[kMaxK / 2];
  for (int64_t i = 0; i < step / 2; ++i) even[i] = z[2 * i % K], odd[i] = z[(2 * i + 1) % K];
  int64_t n = 0;
  for (; n + W <= rows; n += W) {
    const bfloat16* from = weight + n * K;
    prefetch_ahead(from, W * K * sizeof(bfloat16), ahead);
    typename S::V v[G] = {};
    for (int64_t k = 0; k < step; k += 2 * W)
      for (int i = 0; i < G; ++i) {
        Bits bits;
        std::memcpy(&bits, from + i * step + k, sizeof(bits));
        v[i] += (typename S::V)(bits << 16) * S::load(even + k / 2);
        v[i] += (typename S::V)(bits & 0xffff0000u) * S::load(odd + k / 2);
      }
    sum_groups<W, G, G>(v);
    if (bias) v[0] += Simd<bfloat16, W>::load(bias + n);
    S::store(w + n, v[0]);
  }
  return n;
}

// generate_pairs where it serves K, else 0 rows done.
template <int W>
int64_t try_pairs(Simd<bfloat16, W> simd, const bfloat16* weight, const bfloat16* bias, const float* z,
                  int64_t K, int64_t rows, float* w, int64_t ahead) {
  if constexpr (W > 1) {
    if (K % (2 * W) == 0) return generate_pairs<W>(simd, weight, bias, z, K, rows, w, ahead);
    if (K == W) return generate_pairs<W / 2>(simd, weight, bias, z, K, rows, w, ahead);
    if (2 * K == W) return generate_pairs<W / 4>(simd, weight, bias, z, K, rows, w, ahead);
  }
  return 0;
}

// w[n] = sum_k weight[n, k] z[k] + bias[n] for `rows` rows; z padded as in PaddedZ; w in T or in the type
// computed with. ahead: bytes from what is read to what will be read soon. Where w is in T the sums are added
// in one order whatever the path, that of Simd::sum over the narrowest vector that holds a row:
// adamw_generate makes the same bits.
template <class T, class Out>
void generate_rows(const T* weight, const T* bias, const compute_t<T>* z, int64_t K, int64_t rows, Out* w,
                   int64_t ahead = kAhead) {
  int64_t n = 0;
  with_width<T>(kMaxK, [&](auto widest) {
    constexpr int W = decltype(widest)::width;
    if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Out, float>)
      n = try_pairs(widest, weight, bias, z, K, rows, w, ahead);
    if (n) return;
    if constexpr (W > 8)
      if (K == 8) n = generate_packed_rows<8>(widest, weight, bias, z, rows, w, ahead);
    if constexpr (W > 4)
      if (K == 4) n = generate_packed_rows<4>(widest, weight, bias, z, rows, w, ahead);
    if constexpr (W > 2)
      if (K == 2) n = generate_packed_rows<2>(widest, weight, bias, z, rows, w, ahead);
  });
  with_width<T>(K, [&](auto simd) {
    using S = decltype(simd);
    if constexpr (S::width > 1)
      n += generate_whole_vectors(simd, weight + n * K, bias ? bias + n : nullptr, z, K, rows - n, w + n,
                                  ahead);
    for (; n < rows; ++n) {
      const T* row = weight + n * K;
      typename S::V acc{};
      int64_t k = 0;
      for (; k + S::width <= K; k += S::width)
        acc += S::load(row + k) * Simd<compute_t<T>, S::width>::load(z + k);
      if (k < K) acc += S::load(row + k, int(K - k)) * Simd<compute_t<T>, S::width>::load(z + k);
      w[n] = narrow<Out>(S::sum(acc) + (bias ? widen(bias[n]) : 0));
    }
  });
}

// sum[k] += sum over the rows of weight[n, k] dw[n], in the type computed with before it is added: call it
// for runs of at most 1024 rows. dw in T or in the type computed with.
template <class T, int W, class D>
void add_weighted_rows(Simd<T, W>, const T* weight, const D* dw, int64_t K, int64_t rows, double* sum,
                       int64_t ahead = kAhead) {
  using S = Simd<T, W>;
  using V = typename S::V;
  using C = typename S::C;
  const auto flush = [&](V acc, int64_t k, int lanes = W) {
    C sums[W];
    Simd<C, W>::store(sums, acc);
    for (int i = 0; i < lanes; ++i) sum[k + i] += sums[i];
  };
  int64_t k = 0;
  for (; k + 4 * W <= K; k += 4 * W) {  // four vectors of columns at a time
    V acc[4] = {};
    for (int64_t n = 0; n < rows; ++n) {
      const C g = widen(dw[n]);
      for (int i = 0; i < 4; ++i) acc[i] += g * S::load(weight + n * K + k + i * W);
    }
    for (int i = 0; i < 4; ++i) flush(acc[i], k + i * W);
  }
  for (; k + W <= K; k += W) {  // four rows at a time: more loads in flight
    V acc[4] = {};
    int64_t n = 0;
    for (; n + 4 <= rows; n += 4) {
      if (k == 0) prefetch_ahead(weight + n * K, 4 * K * sizeof(T), ahead);
      for (int i = 0; i < 4; ++i) acc[i] += widen(dw[n + i]) * S::load(weight + (n + i) * K + k);
    }
    for (; n < rows; ++n) acc[0] += widen(dw[n]) * S::load(weight + n * K + k);
    flush((acc[0] + acc[1]) + (acc[2] + acc[3]), k);
  }
  if (k < K) {
    V acc{};
    for (int64_t n = 0; n < rows; ++n) acc += widen(dw[n]) * S::load(weight + n * K + k, int(K - k));
    flush(acc, k, int(K - k));
  }
}

}  // namespace
}  // namespace hyperfast
