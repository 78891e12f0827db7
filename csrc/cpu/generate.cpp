// w[n] = sum_k weight[n, k] z[k] + bias[n], all layers in one pass over the generators.
// Floor: the N K weights are read once; w, bias and z are 1/K of that.
#include "blocks.h"

namespace hyperfast {
namespace {

template <class T, int W>
void generate_rows(Simd<T, W>, const GenerateSegment& s, int64_t begin, int64_t end) {
  using S = Simd<T, W>;
  using C = typename S::C;
  const PaddedZ<T> z(s.z, s.K);
  const T* bias = static_cast<const T*>(s.bias);
  T* w = static_cast<T*>(s.w);
  const int64_t whole = s.K / W * W;
  const int tail = int(s.K - whole);
  for (int64_t n = begin; n < end; ++n) {
    const T* row = static_cast<const T*>(s.weight) + n * s.K;
    prefetch_ahead(row, s.K * sizeof(T));
    typename S::V acc{};
    for (int64_t k = 0; k < whole; k += W) acc += S::load(row + k) * Simd<C, W>::load(z.values + k);
    if (tail) acc += S::load(row + whole, tail) * Simd<C, W>::load(z.values + whole);
    w[n] = narrow<T>(S::sum(acc) + (bias ? widen(bias[n]) : C(0)));
  }
}

}  // namespace

namespace HYPERFAST_ISA {

void generate(const GenerateSegment* segments, int64_t count, DType dtype, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    for_each_block(segments, count, threads,
                   [](const GenerateSegment& s, int64_t begin, int64_t end, int64_t) {
                     with_width<T>(s.K, [&](auto simd) { generate_rows(simd, s, begin, end); });
                   });
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
