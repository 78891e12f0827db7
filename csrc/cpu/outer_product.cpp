// Outer products of the rows of x with the embedding of their sample, and the gradients of both factors. They
// stand around the matrix products of a layer of few rows a sample: y = sum_ik x_i z_k weight[o, i, k] reads
// the generator as it is stored, [O, I K]. Floor: the products, B T I K numbers, are written once, and their
// gradient is read once for dx and dz together; chunks of samples (hyperfast/ops/per_sample.py) keep them in
// cache.
#include "rows.h"

namespace hyperfast {
namespace {

constexpr int64_t kRun = 256;  // rows of [I, K] read for dx and, while in cache, for dz

// to[i, k] = x[i] z[k]
template <class T, int W>
void outer(Simd<T, W>, const T* x, const compute_t<T>* z, int64_t I, int64_t K, T* to) {
  using S = Simd<T, W>;
  for (int64_t i = 0; i < I; ++i, to += K) {
    const auto value = widen(x[i]);
    int64_t k = 0;
    for (; k + W <= K; k += W) S::store(to + k, value * Simd<compute_t<T>, W>::load(z + k));
    if (k < K) S::store(to + k, value * Simd<compute_t<T>, W>::load(z + k), int(K - k));
  }
}

// Rows of sample b; dz sums in double over runs, in their order.
template <class T>
void sample_backward(const OuterProductBackward& p, int64_t b) {
  const auto& [B, rows, I, K] = p.sizes;
  const PaddedZ<T> z(static_cast<const T*>(p.z) + b * K, K);
  double sums[kMaxK] = {};
  for (int64_t m = b * rows; m < (b + 1) * rows; ++m)
    for (int64_t i = 0; i < I; i += kRun) {
      const int64_t count = I - i < kRun ? I - i : kRun, first = m * I + i;
      const T* from = static_cast<const T*>(p.dproducts) + first * K;
      T* dx = static_cast<T*>(p.dx) + first;
      if (p.dx) generate_rows(from, p.add ? dx : nullptr, z.values, K, count, dx);
      if (p.dz)
        with_width<T>(K, [&](auto simd) {
          add_weighted_rows(simd, from, static_cast<const T*>(p.x) + first, K, count, sums);
        });
    }
  if (p.dz)
    for (int64_t k = 0; k < K; ++k) static_cast<T*>(p.dz)[b * K + k] = narrow<T>(compute_t<T>(sums[k]));
}

}  // namespace

namespace HYPERFAST_ISA {

void outer_product(const OuterProduct& p, DType dtype, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto& [B, rows, I, K] = p.sizes;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < B * rows; ++m) {
      const PaddedZ<T> z(static_cast<const T*>(p.z) + m / rows * K, K);
      with_width<T>(K, [&](auto simd) {
        outer(simd, static_cast<const T*>(p.x) + m * I, z.values, I, K,
              static_cast<T*>(p.products) + m * I * K);
      });
    }
  });
}

void outer_product_backward(const OuterProductBackward& p, DType dtype, int threads) {
  with_dtype(dtype, [&](auto t) {
#pragma omp parallel for num_threads(threads)
    for (int64_t b = 0; b < p.sizes.B; ++b) sample_backward<decltype(t)>(p, b);
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
