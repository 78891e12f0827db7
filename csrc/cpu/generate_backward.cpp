// dz[k] = sum_n weight[n, k] dw[n] and |dw|^2. The gradient of weight is dw outer z: rank one, never formed.
// Floor: the N K weights are read once. dz adds N terms: each block of at most 1024 rows sums in the compute
// type, the blocks are added in double, one after another, so that the result depends neither on thread
// timing nor on the number of threads.
#include "blocks.h"

namespace hyperfast {
namespace {

// partial[k] = sum over the block's rows of weight[n, k] dw[n], four vectors of columns at a time
template <class T, int W>
void backward_rows(Simd<T, W>, const GenerateBackwardSegment& s, int64_t begin, int64_t end,
                   double* partial) {
  using S = Simd<T, W>;
  using V = typename S::V;
  using C = typename S::C;
  const T* weight = static_cast<const T*>(s.weight);
  const T* dw = static_cast<const T*>(s.dw);
  const auto flush = [&](V acc, int64_t k) {
    C lanes[W];
    Simd<C, W>::store(lanes, acc);
    for (int64_t i = 0; i < W && k + i < s.K; ++i) partial[k + i] = lanes[i];
  };
  int64_t k = 0;
  for (; k + 4 * W <= s.K; k += 4 * W) {
    V acc[4] = {};
    for (int64_t n = begin; n < end; ++n) {
      const C g = widen(dw[n]);
      for (int i = 0; i < 4; ++i) acc[i] += g * S::load(weight + n * s.K + k + i * W);
    }
    for (int i = 0; i < 4; ++i) flush(acc[i], k + i * W);
  }
  for (; k + W <= s.K; k += W) {  // four rows at a time: more loads in flight
    V acc[4] = {};
    int64_t n = begin;
    for (; n + 4 <= end; n += 4) {
      if (k == 0) prefetch_ahead(weight + n * s.K, 4 * s.K * sizeof(T));
      for (int i = 0; i < 4; ++i) acc[i] += widen(dw[n + i]) * S::load(weight + (n + i) * s.K + k);
    }
    for (; n < end; ++n) acc[0] += widen(dw[n]) * S::load(weight + n * s.K + k);
    flush((acc[0] + acc[1]) + (acc[2] + acc[3]), k);
  }
  if (k < s.K) {
    V acc{};
    for (int64_t n = begin; n < end; ++n) acc += widen(dw[n]) * S::load(weight + n * s.K + k, int(s.K - k));
    flush(acc, k);
  }
  double norm = 0;
  for (int64_t n = begin; n < end; ++n) norm += double(widen(dw[n])) * double(widen(dw[n]));
  partial[s.K] = norm;
}

template <class T>
void sum_blocks(const GenerateBackwardSegment& s, const double* partial) {
  double dz[kMaxK + 1] = {};
  for (int64_t block = 0; block < num_blocks(s.N, s.K); ++block, partial += s.K + 1)
    for (int64_t k = 0; k <= s.K; ++k) dz[k] += partial[k];
  for (int64_t k = 0; k < s.K; ++k) static_cast<T*>(s.dz)[k] = narrow<T>(compute_t<T>(dz[k]));
  *s.squared_norm = dz[s.K];
}

}  // namespace

namespace HYPERFAST_ISA {

void generate_backward(const GenerateBackwardSegment* segments, int64_t count, DType dtype, double* scratch,
                       int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto partials =
        [&](const GenerateBackwardSegment& s) {  // where the segment's blocks begin in scratch
          double* p = scratch;
          for (const auto* q = segments; q != &s; ++q) p += num_blocks(q->N, q->K) * (q->K + 1);
          return p;
        };
    for_each_block(segments, count, threads,
                   [&](const GenerateBackwardSegment& s, int64_t begin, int64_t end, int64_t) {
                     double* partial = partials(s) + begin / rows_per_block(s.K) * (s.K + 1);
                     with_width<T>(s.K, [&](auto simd) { backward_rows(simd, s, begin, end, partial); });
                   });
    for (int64_t i = 0; i < count; ++i) sum_blocks<T>(segments[i], partials(segments[i]));
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
