// dz[k] = sum_n weight[n, k] dw[n] and |dw|^2. The gradient of weight is dw outer z: rank one, never formed.
// Floor: the N K weights are read once. dz adds N terms: each block of at most 1024 rows sums in the compute
// type, the blocks are added in double, one after another, so that the result depends neither on thread
// timing nor on the number of threads.
#include "rows.h"

namespace hyperfast {
namespace {

template <class T>
void backward_block(const GenerateBackwardSegment& s, int64_t begin, int64_t end, double* partial) {
  const T *weight = static_cast<const T*>(s.weight) + begin * s.K, *dw = static_cast<const T*>(s.dw);
  for (int64_t k = 0; k < s.K; ++k) partial[k] = 0;
  with_width<T>(s.K,
                [&](auto simd) { add_weighted_rows(simd, weight, dw + begin, s.K, end - begin, partial); });
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
                     backward_block<T>(s, begin, end, partial);
                   });
    for (int64_t i = 0; i < count; ++i) sum_blocks<T>(segments[i], partials(segments[i]));
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
