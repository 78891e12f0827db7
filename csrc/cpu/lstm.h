// What the forward and the backward of an LSTM share: packed weights, layer norm's statistics, walks over
// columns. Products are in panels.h, the gates' functions in activations.h, dropout in
// philox.h.
#pragma once
#include <algorithm>

#include "activations.h"
#include "blocks.h"
#include "panels.h"
#include "philox.h"

namespace hyperfast {

constexpr int64_t kLstmRows = 16;  // rows of a step whose gates a thread has at hand
constexpr int64_t kZRows = 8;      // of them, rows whose embeddings lie side by side

// Whether the forward packs its weights or multiplies by them as they lie. H 512, M 128, two cores: packing
// takes 0.8 ms, a step of 1, 8 or 32 rows then 0.13, 0.17, 0.39 ms, without it 0.10, 0.30, 0.9.
inline bool packs_weights(const LstmSizes& s) { return s.N > 64 && s.B > 2; }
inline bool packs_scales(const LstmSizes& s) { return s.N > 16 && s.M; }

// The threads that a step has work for: kThreadProducts outweigh what a thread costs at its barriers.
constexpr int64_t kThreadProducts = 32768;
inline int lstm_threads(const LstmSizes& s, int threads) {
  const int64_t products = s.B * 4 * (s.H * s.H + s.M * (s.H + s.M));  // of a step
  return int(std::min<int64_t>(threads, 1 + products / kThreadProducts));
}

// Numbers of d_weight as DPanels packs it.
inline int64_t d_panels_size(int64_t H, int64_t Z) { return 12 * count_panels(H) * Z * kPanel; }

// The parts of LstmPacked of the forward. C: the type computed with.
template <class C>
struct LstmPackedParts {
  C* weights;              // hyper_weight_xh over hyper_weight_hh, then weight_hh
  C *z_weight, *d_weight;  // null: not packed
  LstmPackedParts(const LstmSizes& s, const void* weights, const void* scales)
      : weights(static_cast<C*>(const_cast<void*>(weights))),
        z_weight(static_cast<C*>(const_cast<void*>(scales))),
        d_weight(scales ? z_weight + packed_size(s.M, 12 * s.Z) : nullptr) {}
};

// Bytes of LstmPacked; the sizes are those of the whole sequence.
struct LstmPackedBytes {
  int64_t weights, scales;
};
inline LstmPackedBytes lstm_packed_bytes(const LstmSizes& s, int64_t element) {
  return {packs_weights(s) ? element * (packed_size(s.H + s.M, 4 * s.M) + packed_size(s.H, 4 * s.H)) : 0,
          packs_scales(s) ? element * (packed_size(s.M, 12 * s.Z) + d_panels_size(s.H, s.Z)) : 0};
}

// Of the forward.
template <class C>
struct LstmScratch {
  C *h_gates, *hyper_gates;  // [B, 4H], [B, 4M], of a step, where they are not kept
  C* gates;                  // [threads, kLstmRows, 4, padded H]
  C *z, *z_columns;          // [threads, kLstmRows, 12Z], [threads, kLstmRows / kZRows, 4, Z, 3, kZRows]
  int64_t bytes;
  LstmScratch(const LstmSizes& s, bool keeps, int threads, void* base) {
    Scratch scratch(base);
    h_gates = scratch.take<C>(keeps ? 0 : s.B * 4 * s.H);
    hyper_gates = scratch.take<C>(keeps ? 0 : s.B * 4 * s.M);
    gates = scratch.take<C>(threads * gates_size(s));
    z = scratch.take<C>(threads * z_size(s));
    z_columns = scratch.take<C>(threads * z_size(s));
    bytes = scratch.bytes;
  }
  static int64_t z_size(const LstmSizes& s) { return kLstmRows * 12 * s.Z; }
  static int64_t gates_size(const LstmSizes& s) { return kLstmRows * 4 * round_up(s.H, kPanel); }
};

inline int64_t lstm_scratch(const LstmSizes& s, bool keeps, DType dtype, int threads) {
  return dtype == DType::float64 ? LstmScratch<double>(s, keeps, threads, nullptr).bytes
                                 : LstmScratch<float>(s, keeps, threads, nullptr).bytes;
}

namespace {

// The first `lanes` lanes of a whole vector or of less; the others are zero.
template <class C, int W>
inline typename Simd<C, W>::V load(Simd<C, W>, const C* p, int lanes) {
  return lanes == W ? Simd<C, W>::load(p) : Simd<C, W>::load(p, lanes);
}
template <class C, int W>
inline void store(Simd<C, W>, C* p, typename Simd<C, W>::V v, int lanes) {
  if (lanes == W) Simd<C, W>::store(p, v);
  else Simd<C, W>::store(p, v, lanes);
}

// Calls f(column, lanes) for every vector of n columns.
template <int W, class F>
inline void for_vectors(int64_t n, F f) {
  int64_t j = 0;
  for (; j + W <= n; j += W) f(j, W);
  if (j < n) f(j, int(n - j));
}

// Mean and 1 / sqrt(variance + eps) of n numbers, in two passes and in an order that n alone decides.
template <class C>
struct RowStatistics {
  C mean, inverse;
  template <int W>
  RowStatistics(Simd<C, W> simd, const C* x, int64_t n, C eps) {
    using S = Simd<C, W>;
    using V = typename S::V;
    const auto sum_of = [&](auto term) {
      V sums[4] = {};
      int64_t j = 0;
      for (; j + 4 * W <= n; j += 4 * W)
        for (int i = 0; i < 4; ++i) sums[i] += term(S::load(x + j + i * W));
      for (; j + W <= n; j += W) sums[0] += term(S::load(x + j));
      C rest = 0;
      if (j < n) {
        C lanes[W];
        S::store(lanes, term(load(simd, x + j, int(n - j))));
        for (int i = 0; i < int(n - j); ++i) rest += lanes[i];
      }
      return S::sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
    };
    mean = sum_of([](V v) { return v; }) / C(n);
    const C center = mean;
    inverse = 1 / std::sqrt(sum_of([&](V v) { return (v - center) * (v - center); }) / C(n) + eps);
  }
};

// d_weight [12, H, Z] packed so that columns of H lie side by side: [4 gates, panels of H, 3 places, Z,
// kPanel], padded with zeros. Places: input path, recurrent path, bias.
struct DPanels {
  int64_t H, Z, panels;
  DPanels(int64_t H, int64_t Z) : H(H), Z(Z), panels(count_panels(H)) {}
  int64_t count() const { return 4 * panels; }  // of all gates; every one is packed by itself
  template <class C>
  const C* at(const C* packed, int64_t gate, int64_t panel) const {
    return packed + (gate * panels + panel) * 3 * Z * kPanel;
  }
  template <class C>
  void pack(const C* d_weight, int64_t i, C* packed) const {
    const int64_t gate = i / panels, panel = i % panels;
    for (int64_t place = 0; place < 3; ++place) {
      const C* from = d_weight + ((place * 4 + gate) * H + panel * kPanel) * Z;
      pack_columns(from, 1, Z, Z, panel_width(H, panel), packed + (i * 3 + place) * Z * kPanel);
    }
  }
};

}  // namespace
}  // namespace hyperfast
