// AdamW on the rank-one gradient dw outer z and the next weights, in one pass.
// Floor: 24 bytes per float32 generator weight (weight, exp_avg, exp_avg_sq read and written); the gradient
// is formed in registers and the next forward reads no generator. The same loads, sums and roundings as
// generate: w is bit for bit what generate would return after the update.
#include "blocks.h"

namespace hyperfast {
namespace {

template <class C>
struct AdamW {  // AdamWCoefficients in the compute type
  C decay, step_size, one_minus_beta1, beta2, one_minus_beta2, inverse_correction2, eps;
  explicit AdamW(const AdamWCoefficients& c)
      : decay(C(c.decay)),
        step_size(C(c.step_size)),
        one_minus_beta1(C(1 - c.beta1)),
        beta2(C(c.beta2)),
        one_minus_beta2(C(1 - c.beta2)),
        inverse_correction2(C(1 / c.bias_correction2_sqrt)),
        eps(C(c.eps)) {}

  template <class S>
  void update(typename S::V& p, typename S::V& m, typename S::V& v, typename S::V g) const {
    m += (g - m) * one_minus_beta1;
    v = beta2 * v + one_minus_beta2 * g * g;
    p = decay * p - step_size * m / (S::sqrt(v) * inverse_correction2 + eps);
  }

  // W whole lanes at p, m, v; returns the new p as stored
  template <class S, class T>
  typename S::V step(T* p, T* m, T* v, typename S::V g) const {
    auto pv = S::load(p), mv = S::load(m), vv = S::load(v);
    update<S>(pv, mv, vv, g);
    S::store(m, mv), S::store(v, vv), S::store(p, pv);
    if constexpr (std::is_same_v<T, bfloat16>) return S::load(p);
    return pv;
  }

  // n < W lanes
  template <class S, class T>
  typename S::V step(T* p, T* m, T* v, typename S::V g, int n) const {
    auto pv = S::load(p, n), mv = S::load(m, n), vv = S::load(v, n);
    update<S>(pv, mv, vv, g);
    S::store(m, mv, n), S::store(v, vv, n), S::store(p, pv, n);
    return S::load(p, n);
  }
};

template <class T>
void update_bias(const AdamWGenerateSegment& s, int64_t begin, int64_t end, compute_t<T> scale) {
  T *p = static_cast<T*>(s.bias), *m = static_cast<T*>(s.bias_exp_avg),
    *v = static_cast<T*>(s.bias_exp_avg_sq);
  const T* dw = static_cast<const T*>(s.dw);
  const AdamW<compute_t<T>> adamw(s.bias_adamw);
  with_width<T>(kMaxK, [&](auto simd) {
    using S = decltype(simd);
    int64_t n = begin;
    for (; n + S::width <= end; n += S::width)
      adamw.template step<S>(p + n, m + n, v + n, S::load(dw + n) * scale);
    if (n < end)
      adamw.template step<S>(p + n, m + n, v + n, S::load(dw + n, int(end - n)) * scale, int(end - n));
  });
}

template <class T, int W>
void update_rows(Simd<T, W>, const AdamWGenerateSegment& s, int64_t begin, int64_t end, compute_t<T> scale) {
  using S = Simd<T, W>;
  using C = typename S::C;
  using Z = Simd<C, W>;
  const PaddedZ<T> z(s.z, s.K), z_next(s.z_next, s.K);
  const AdamW<C> adamw(s.weight_adamw);
  const T *bias = static_cast<const T*>(s.bias), *dw = static_cast<const T*>(s.dw);
  T* w = static_cast<T*>(s.w);
  const int64_t whole = s.K / W * W;
  const int tail = int(s.K - whole);
  for (int64_t n = begin; n < end; ++n) {
    T* p = static_cast<T*>(s.weight) + n * s.K;
    T* m = static_cast<T*>(s.exp_avg) + n * s.K;
    T* v = static_cast<T*>(s.exp_avg_sq) + n * s.K;
    for (const T* stream : {p, m, v}) prefetch_ahead<1>(stream, s.K * sizeof(T));
    const C g = widen(dw[n]) * scale;
    typename S::V acc{};
    for (int64_t k = 0; k < whole; k += W)
      acc +=
          adamw.template step<S>(p + k, m + k, v + k, g * Z::load(z.values + k)) * Z::load(z_next.values + k);
    if (tail)
      acc += adamw.template step<S>(p + whole, m + whole, v + whole, g * Z::load(z.values + whole), tail) *
             Z::load(z_next.values + whole);
    w[n] = narrow<T>(S::sum(acc) + (bias ? widen(bias[n]) : C(0)));
  }
}

}  // namespace

namespace HYPERFAST_ISA {

void adamw_generate(const AdamWGenerateSegment* segments, int64_t count, DType dtype, double grad_scale,
                    int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto scale = compute_t<T>(grad_scale);
    for_each_block(segments, count, threads,
                   [&](const AdamWGenerateSegment& s, int64_t begin, int64_t end, int64_t) {
                     if (s.bias_exp_avg) update_bias<T>(s, begin, end, scale);
                     with_width<T>(s.K, [&](auto simd) { update_rows(simd, s, begin, end, scale); });
                   });
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
