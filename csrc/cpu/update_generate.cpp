// An optimizer's update of the rank-one gradient dw outer z and the next weights, in one pass.
// Floor for each float32 generator weight: 8 bytes (read, written) and 8 for each float32 state, 4 for each
// bfloat16, 2 for each 8-bit one; the gradient is formed in registers and the next forward reads no
// generator. The same loads, sums and roundings as generate: w is bit for bit what generate would return
// after the update.
#include "blocks.h"
#include "state_storage.h"

namespace hyperfast {
namespace {

// The rules in the compute type C: update<S>(p, states, g) for vectors of S. kernels.h has the equations.
// exact: IEEE's square root and quotient, for states that are exact themselves.
template <class C, bool exact>
struct Adam {
  static constexpr int states = 2;
  // f(format of state j in 8 bits, in bfloat16, j)
  template <class F>
  static void for_each_format(F f) {
    f(Signed8(), BFloat16Low(), 0);
    f(Unsigned8(), BFloat16High(), 1);
  }
  C decay, step_size, one_minus_beta1, beta2, one_minus_beta2, inverse_correction2, eps, l2;
  explicit Adam(const Coefficients& c)
      : decay(C(c[0])),
        step_size(C(c[1])),
        one_minus_beta1(C(1 - c[2])),
        beta2(C(c[3])),
        one_minus_beta2(C(1 - c[3])),
        inverse_correction2(C(1 / c[4])),
        eps(C(c[5])),
        l2(C(c[6])) {}

  template <class S>
  void update(typename S::V& p, typename S::V (&state)[2], typename S::V g) const {
    auto &m = state[0], &v = state[1];
    g += l2 * p;
    m += (g - m) * one_minus_beta1;
    v = beta2 * v + one_minus_beta2 * g * g;
    if constexpr (exact) p = decay * p - step_size * m / (S::sqrt(v) * inverse_correction2 + eps);
    else p = decay * p - S::fast_divide(step_size * m, S::fast_sqrt(v) * inverse_correction2 + eps);
  }
};

template <class C>
struct SGD {
  static constexpr int states = 0;
  C lr, l2, keep, take, gradient, buffer;
  explicit SGD(const Coefficients& c)
      : lr(C(c[0])), l2(C(c[1])), keep(C(c[2])), take(C(c[3])), gradient(C(c[4])), buffer(C(c[5])) {}

  template <class S>
  void update(typename S::V& p, typename S::V (&)[2], typename S::V g) const {
    p -= lr * (g + l2 * p);
  }
};

template <class C>
struct Momentum : SGD<C> {
  static constexpr int states = 1;
  template <class F>
  static void for_each_format(F f) {
    f(Signed8(), BFloat16Low(), 0);
  }
  using SGD<C>::SGD;

  template <class S>
  void update(typename S::V& p, typename S::V (&state)[2], typename S::V g) const {
    auto& b = state[0];
    g += this->l2 * p;
    b = this->keep * b + this->take * g;
    p -= this->lr * (this->gradient * g + this->buffer * b);
  }
};

template <class T>
using States = T* [kMaxStates];  // those of rows begin .. end

// W whole lanes at p and at states + i; returns the new p as stored
template <class S, class R, class T>
typename S::V step(const R& rule, T* p, const States<T>& states, int64_t i, typename S::V g) {
  typename S::V x[kMaxStates] = {}, pv = S::load(p);
  for (int j = 0; j < R::states; ++j) x[j] = S::load(states[j] + i);
  rule.template update<S>(pv, x, g);
  for (int j = 0; j < R::states; ++j) S::store(states[j] + i, x[j]);
  S::store(p, pv);
  if constexpr (std::is_same_v<T, bfloat16>) return S::load(p);
  return pv;
}

// n < W lanes
template <class S, class R, class T>
typename S::V step(const R& rule, T* p, const States<T>& states, int64_t i, typename S::V g, int n) {
  typename S::V x[kMaxStates] = {}, pv = S::load(p, n);
  for (int j = 0; j < R::states; ++j) x[j] = S::load(states[j] + i, n);
  rule.template update<S>(pv, x, g);
  for (int j = 0; j < R::states; ++j) S::store(states[j] + i, x[j], n);
  S::store(p, pv, n);
  return S::load(p, n);
}

template <class T, class R>
void update_bias(const R& rule, const UpdateGenerateSegment& s, int64_t begin, int64_t end,
                 const States<T>& states, compute_t<T> scale) {
  T* p = static_cast<T*>(s.bias.values);
  const T* dw = static_cast<const T*>(s.dw);
  with_width<T>(kMaxK, [&](auto simd) {
    using S = decltype(simd);
    int64_t n = begin;
    for (; n + S::width <= end; n += S::width)
      step<S>(rule, p + n, states, n - begin, S::load(dw + n) * scale);
    if (n < end) step<S>(rule, p + n, states, n - begin, S::load(dw + n, int(end - n)) * scale, int(end - n));
  });
}

template <class T, int W, class R>
void update_rows(Simd<T, W>, const R& rule, const PaddedZ<T>& z, const PaddedZ<T>& z_next,
                 const UpdateGenerateSegment& s, int64_t begin, int64_t end, const States<T>& states,
                 Storage storage, compute_t<T> scale) {
  using S = Simd<T, W>;
  using C = typename S::C;
  using Z = Simd<C, W>;
  const T *bias = static_cast<const T*>(s.bias.values), *dw = static_cast<const T*>(s.dw);
  T* w = static_cast<T*>(s.w);
  const int64_t whole = s.K / W * W;
  const int tail = int(s.K - whole);
  constexpr int64_t rows = 16;  // added up across lanes together: their long chains of operations overlap
  for (int64_t first = begin; first < end; first += rows) {
    const int64_t last = std::min(first + rows, end);
    typename S::V sums[rows];
    for (int64_t n = first; n < last; ++n) {
      T* p = static_cast<T*>(s.weight.values) + n * s.K;
      const int64_t row = (n - begin) * s.K;
      prefetch_ahead<1>(p, s.K * sizeof(T));
      if (storage == Storage::plain)
        for (int j = 0; j < R::states; ++j) prefetch_ahead<1>(states[j] + row, s.K * sizeof(T));
      const C g = widen(dw[n]) * scale;
      typename S::V acc{};
      for (int64_t k = 0; k < whole; k += W)
        acc += step<S>(rule, p + k, states, row + k, g * Z::load(z.values + k)) * Z::load(z_next.values + k);
      if (tail)
        acc += step<S>(rule, p + whole, states, row + whole, g * Z::load(z.values + whole), tail) *
               Z::load(z_next.values + whole);
      sums[n - first] = acc;
    }
    for (int64_t n = first; n < last; ++n)
      w[n] = narrow<T>(S::sum(sums[n - first]) + (bias ? widen(bias[n]) : C(0)));
  }
}

// Calls f(begin, end, states) for groups of rows whose states lie there as T: in memory, or decoded before
// and coded again after. first: what the elements count from, for stochastic rounding.
template <class T, class R, class F>
void with_states(Storage storage, const Updated& u, int64_t K, int64_t begin, int64_t end, uint32_t seed,
                 uint32_t first, F f) {
  if (storage == Storage::plain || R::states == 0) {
    States<T> states = {};
    for (int j = 0; j < R::states; ++j) states[j] = static_cast<T*>(u.states[j].values) + begin * K;
    return f(begin, end, states);
  }
  if constexpr (std::is_same_v<T, float> && R::states > 0) {
    alignas(64) float values[kMaxStates][kSlice + 16];
    alignas(64) uint32_t random[kSlice + 16];
    States<float> states = {values[0], values[1]};
    const int64_t rows = kSlice / K / rows_per_scale(K) * rows_per_scale(K);
    with_width<float>(kMaxK, [&](auto simd) {
      for (int64_t n = begin; n < end; n += rows) {
        const Slice slice{n, std::min(rows, end - n), K};
        R::for_each_format([&](auto eight, auto sixteen, int j) {
          if (storage == Storage::eight_bit) decode<decltype(eight)>(simd, u.states[j], slice, values[j]);
          else decode<decltype(sixteen)>(simd, u.states[j], slice, values[j]);
        });
        f(n, n + slice.rows, states);
        fill_random(simd, seed, first + uint32_t(n * K), slice.count(), random);
        R::for_each_format([&](auto eight, auto sixteen, int j) {
          if (storage == Storage::eight_bit)
            encode<decltype(eight)>(simd, values[j], u.states[j], slice, random);
          else encode<decltype(sixteen)>(simd, values[j], u.states[j], slice, random);
        });
      }
    });
  }
}

template <class T, class R>
void update_block(const UpdateGenerateSegment& s, int64_t begin, int64_t end, Storage storage,
                  compute_t<T> scale) {
  if (s.bias_is_trained) {
    const R rule(s.bias.coefficients);
    with_states<T, R>(storage, s.bias, 1, begin, end, s.seed, uint32_t(s.N * s.K),
                      [&](int64_t from, int64_t to, const States<T>& states) {
                        update_bias<T>(rule, s, from, to, states, scale);
                      });
  }
  const R rule(s.weight.coefficients);
  const PaddedZ<T> z(s.z, s.K), z_next(s.z_next, s.K);
  with_width<T>(s.K, [&](auto simd) {
    with_states<T, R>(storage, s.weight, s.K, begin, end, s.seed, 0,
                      [&](int64_t from, int64_t to, const States<T>& states) {
                        update_rows(simd, rule, z, z_next, s, from, to, states, storage, scale);
                      });
  });
}

}  // namespace

namespace HYPERFAST_ISA {

void update_generate(const UpdateGenerateSegment* segments, int64_t count, DType dtype, Rule rule,
                     Storage storage, double grad_scale, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    for_each_block(segments, count, threads,
                   [&](const UpdateGenerateSegment& s, int64_t begin, int64_t end, int64_t) {
                     if (rule == Rule::adam && storage == Storage::plain)
                       update_block<T, Adam<C, true>>(s, begin, end, storage, C(grad_scale));
                     else if (rule == Rule::adam)
                       update_block<T, Adam<C, false>>(s, begin, end, storage, C(grad_scale));
                     else if (s.weight.states[0].values)
                       update_block<T, Momentum<C>>(s, begin, end, storage, C(grad_scale));
                     else update_block<T, SGD<C>>(s, begin, end, storage, C(grad_scale));
                   });
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
