// w[n] = sum_k weight[n, k] z[k] + bias[n], all layers in one pass over the generators.
// Floor: the N K weights are read once; w, bias and z are 1/K of that.
#include "rows.h"

namespace hyperfast {
namespace {

template <class T>
void generate_block(const GenerateSegment& s, int64_t begin, int64_t end) {
  const PaddedZ<T> z(s.z, s.K);
  const T *weight = static_cast<const T*>(s.weight) + begin * s.K, *bias = static_cast<const T*>(s.bias);
  generate_rows(weight, bias ? bias + begin : nullptr, z.values, s.K, end - begin,
                static_cast<T*>(s.w) + begin);
}

}  // namespace

namespace HYPERFAST_ISA {

void generate(const GenerateSegment* segments, int64_t count, DType dtype, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    for_each_block(segments, count, threads,
                   [](const GenerateSegment& s, int64_t begin, int64_t end, int64_t) {
                     generate_block<T>(s, begin, end);
                   });
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
