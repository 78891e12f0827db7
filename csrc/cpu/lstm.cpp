// An LSTM, layer-norm LSTM or HyperLSTM over a whole packed sequence; equations: hyperfast/reference.py.
// Floor of a step of b rows: 2 b (4 H H + 4 M (H + M)) flops of recurrent products and 2 b 12 Z (M + H) of
// embeddings and scales, and the weights read once from the cache that holds them (5.7 MB in float32 at H
// 512, M 128, Z 16). One parallel region covers the sequence. A step has two phases with a barrier after
// each: the products, of which every thread makes the columns of the panels it owns, and everything else, row
// by row; the 12 H scales and offsets of a row live in registers only.
#include "lstm.h"

#include <omp.h>

namespace hyperfast {
namespace {

// The norms of a cell of n units; all null: none.
template <class C>
struct Norms {
  const C *gates_weight, *gates_bias, *cell_weight, *cell_bias;
  explicit Norms(const LstmNorms& norms)
      : gates_weight(static_cast<const C*>(norms.gates_weight)),
        gates_bias(static_cast<const C*>(norms.gates_bias)),
        cell_weight(static_cast<const C*>(norms.cell_weight)),
        cell_bias(static_cast<const C*>(norms.cell_bias)) {}
};

// One row of a cell of n units: c and h from gates i, f, g, o, `stride` apart, and the c before. scale: of
// dropout, or null.
template <class C, int W>
void cell_row(Simd<C, W> simd, int64_t n, const C* gates, int64_t stride, const Norms<C>& norms, C eps,
              const DropoutScale<C>* scale, int64_t row, const C* before, C* c, C* h) {
  using V = typename Simd<C, W>::V;
  const bool normed = norms.gates_weight;
  C mean[4], inverse[4];
  for (int gate = 0; gate < 4 && normed; ++gate) {
    const RowStatistics<C> statistics(simd, gates + gate * stride, n, eps);
    mean[gate] = statistics.mean, inverse[gate] = statistics.inverse;
  }
  for_vectors<W>(n, [&](int64_t j, int lanes) {
    V v[4];
    for (int gate = 0; gate < 4; ++gate) {
      v[gate] = load(simd, gates + gate * stride + j, lanes);
      if (normed)
        v[gate] =
            (v[gate] - mean[gate]) * inverse[gate] * load(simd, norms.gates_weight + gate * n + j, lanes) +
            load(simd, norms.gates_bias + gate * n + j, lanes);
    }
    V candidate = tanh(simd, v[2]);
    if (scale) candidate *= scale->at(simd, row, j);
    const V now = sigmoid(simd, v[1]) * load(simd, before + j, lanes) + sigmoid(simd, v[0]) * candidate;
    const V out = sigmoid(simd, v[3]);
    store(simd, c + j, now, lanes);
    store(simd, h + j, normed ? out : out * tanh(simd, now), lanes);
  });
  if (!normed) return;
  const RowStatistics<C> cell(simd, c, n, eps);
  for_vectors<W>(n, [&](int64_t j, int lanes) {
    const V read =
        (load(simd, c + j, lanes) - cell.mean) * cell.inverse * load(simd, norms.cell_weight + j, lanes) +
        load(simd, norms.cell_bias + j, lanes);
    store(simd, h + j, load(simd, h + j, lanes) * tanh(simd, read), lanes);
  });
}

// What the threads share, and what one of them does.
template <class C, int W>
struct Sequence {
  using S = Simd<C, W>;
  const Lstm& p;
  const LstmSizes& s;
  const LstmScratch<C>& scratch;
  const Norms<C> norms, hyper_norms;
  const DropoutScale<C> dropout, hyper_dropout;
  const DPanels d_panels;
  const int64_t hyper_panels, panels;  // of the gates of the two cells

  Sequence(const Lstm& p, const LstmScratch<C>& scratch)
      : p(p),
        s(p.sizes),
        scratch(scratch),
        norms(p.weights.norms),
        hyper_norms(p.weights.hyper_norms),
        dropout(p.dropout.key ? *p.dropout.key : 0, p.dropout.share, 0),
        hyper_dropout(p.dropout.key ? *p.dropout.key : 0, p.dropout.share, 1),
        d_panels(s.H, s.Z),
        hyper_panels(count_panels(4 * s.M)),
        panels(hyper_panels + count_panels(4 * s.H)) {}

  static const C* in(const void* tensor) { return static_cast<const C*>(tensor); }
  static C* out(void* tensor) { return static_cast<C*>(tensor); }

  // A step: its first row among all, its rows, and the states it goes on from.
  struct Step {
    int64_t start, rows;
    const C *h, *c, *hyper_h, *hyper_c;
    C *h_gates, *hyper_gates;
  };
  Step step_at(int64_t t, int64_t start, int64_t last) const {
    const auto state = [&](const void* initial, const void* states, int64_t n) {
      return t == 0 || n == 0 ? in(initial) : in(states) + last * n;
    };
    return {start,
            s.batch_sizes[t],
            state(p.h0, p.h, s.H),
            state(p.c0, p.c, s.H),
            state(p.hyper_h0, p.hyper_h, s.M),
            state(p.hyper_c0, p.hyper_c, s.M),
            p.h_gates ? out(p.h_gates) + start * 4 * s.H : scratch.h_gates,
            p.hyper_gates ? out(p.hyper_gates) + start * 4 * s.M : scratch.hyper_gates};
  }

  // The panels of a thread, hyper cell first: an equal part of the products' flops.
  Share own_panels(int64_t thread, int64_t threads) const {
    const int64_t hyper_flops = s.H + s.M, total = hyper_panels * hyper_flops + (panels - hyper_panels) * s.H;
    const auto first = [&](int64_t thread) {
      const int64_t before = total * thread / threads, in_hyper = hyper_panels * hyper_flops;
      return before < in_hyper ? ceil_div(before, hyper_flops)
                               : hyper_panels + ceil_div(before - in_hyper, s.H);
    };
    Share share(panels, thread, threads);
    share.begin = first(thread), share.end = first(thread + 1);
    return share;
  }

  void pack(const Share& own, int64_t thread, int64_t threads) const {
    const LstmWeights& w = p.weights;
    for (int64_t i = own.begin; i < own.end; ++i) {
      if (i < hyper_panels) {
        pack_panel(in(w.hyper_weight_xh), 1, s.H, s.H, 4 * s.M, i, scratch.hyper_weight_xh);
        pack_panel(in(w.hyper_weight_hh), 1, s.M, s.M, 4 * s.M, i, scratch.hyper_weight_hh);
      } else {
        pack_panel(in(w.weight_hh), 1, s.H, s.H, 4 * s.H, i - hyper_panels, scratch.weight_hh);
      }
    }
    if (!s.M) return;
    const Share z(count_panels(12 * s.Z), thread, threads), d(d_panels.count(), thread, threads);
    for (int64_t i = z.begin; i < z.end; ++i)
      pack_panel(in(w.z_weight), 1, s.M, s.M, 12 * s.Z, i, scratch.z_weight);
    for (int64_t i = d.begin; i < d.end; ++i) d_panels.pack(in(w.d_weight), i, scratch.d_weight);
  }

  // h_gates = weight_hh h, hyper_gates = hyper_x_gates + hyper_weight_xh h + hyper_weight_hh hyper_h
  void products(const Step& step, int64_t panel) const {
    const S simd;
    if (panel >= hyper_panels) {
      C* to = step.h_gates;
      return multiply_panel(simd, step.rows, step.h, s.H, scratch.weight_hh, s.H, 4 * s.H,
                            panel - hyper_panels, [&](int64_t b, int64_t j, auto sums, int lanes) {
                              store(simd, to + b * 4 * s.H + j, sums, lanes);
                            });
    }
    const C* x = in(p.hyper_x_gates) + step.start * 4 * s.M;
    C* to = step.hyper_gates;
    multiply_panel(simd, step.rows, step.h, s.H, scratch.hyper_weight_xh, s.H, 4 * s.M, panel,
                   [&](int64_t b, int64_t j, auto sums, int lanes) {
                     const int64_t at = b * 4 * s.M + j;
                     store(simd, to + at, load(simd, x + at, lanes) + sums, lanes);
                   });
    multiply_panel(simd, step.rows, step.hyper_h, s.M, scratch.hyper_weight_hh, s.M, 4 * s.M, panel,
                   [&](int64_t b, int64_t j, auto sums, int lanes) {
                     const int64_t at = b * 4 * s.M + j;
                     store(simd, to + at, load(simd, to + at, lanes) + sums, lanes);
                   });
  }

  // z [rows, 12Z] of rows `first` on
  void embeddings(int64_t first, int64_t rows, C* z) const {
    const S simd;
    const C* bias = in(p.weights.z_bias);
    for (int64_t panel = 0; panel < count_panels(12 * s.Z); ++panel)
      multiply_panel(simd, rows, in(p.hyper_h) + first * s.M, s.M, scratch.z_weight, s.M, 12 * s.Z, panel,
                     [&](int64_t b, int64_t j, auto sums, int lanes) {
                       store(simd, z + b * 12 * s.Z + j, sums + load(simd, bias + j, lanes), lanes);
                     });
  }

  // gates [rows, 4, padded H] = d_x x_gates + d_h h_gates + d_b + bias: x_gates and h_gates of these rows
  void modulate(int64_t rows, const C* z, const C* x_gates, const C* h_gates, C* gates) const {
    const S simd;
    const int64_t padded = round_up(s.H, kPanel);
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t panel = 0; panel < d_panels.panels; ++panel) {
        const int64_t first = panel * kPanel, left = s.H - first;
        const int64_t width = left < kPanel ? round_up(left, W) : kPanel;
        C* to = gates + gate * padded + first;
        const auto place = [&](int64_t place, const C* factors, bool add) {
          const C* from = factors + gate * s.H + first;
          const int64_t row_stride = place == 2 ? 0 : 4 * s.H;
          multiply(simd, rows, width, z + (place * 4 + gate) * s.Z, 12 * s.Z, int64_t(1),
                   d_panels.at(scratch.d_weight, gate, panel, place), kPanel, s.Z,
                   [&](int64_t b, int64_t j, auto sums) {
                     C* at = to + b * 4 * padded + j;
                     const int lanes = int(left - j < W ? left - j : W);
                     const auto factor = load(simd, from + b * row_stride + j, lanes);
                     const auto term = place == 2 ? sums + factor : sums * factor;
                     S::store(at, add ? S::load(at) + term : term);
                   });
        };
        place(0, x_gates, false);
        place(1, h_gates, true);
        place(2, in(p.weights.bias), true);
      }
  }

  // gates [rows, 4, padded H] = x_gates + h_gates + bias
  void add_gates(int64_t rows, const C* x_gates, const C* h_gates, C* gates) const {
    const S simd;
    const C* bias = in(p.weights.bias);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t gate = 0; gate < 4; ++gate) {
        const int64_t at = b * 4 * s.H + gate * s.H;
        C* to = gates + (b * 4 + gate) * round_up(s.H, kPanel);
        for_vectors<W>(s.H, [&](int64_t j, int lanes) {
          S::store(to + j, load(simd, x_gates + at + j, lanes) + load(simd, h_gates + at + j, lanes) +
                               load(simd, bias + gate * s.H + j, lanes));
        });
      }
  }

  // Everything but the products for rows `first` to `end` of a step, at most kLstmRows.
  void cells(const Step& step, int64_t first, int64_t end, C* gates, C* z) const {
    const S simd;
    const int64_t rows = end - first, start = step.start + first, padded = round_up(s.H, kPanel);
    const C* x_gates = in(p.x_gates) + start * 4 * s.H;
    const C* h_gates = step.h_gates + first * 4 * s.H;
    const bool drops = p.dropout.share > 0;
    if (s.M) {
      for (int64_t b = first; b < end; ++b)
        cell_row(simd, s.M, step.hyper_gates + b * 4 * s.M, s.M, hyper_norms, C(p.eps),
                 drops ? &hyper_dropout : nullptr, step.start + b, step.hyper_c + b * s.M,
                 out(p.hyper_c) + (step.start + b) * s.M, out(p.hyper_h) + (step.start + b) * s.M);
      embeddings(start, rows, z);
      modulate(rows, z, x_gates, h_gates, gates);
    } else {
      add_gates(rows, x_gates, h_gates, gates);
    }
    for (int64_t b = 0; b < rows; ++b)
      cell_row(simd, s.H, gates + b * 4 * padded, padded, norms, C(p.eps), drops ? &dropout : nullptr,
               start + b, step.c + (first + b) * s.H, out(p.c) + (start + b) * s.H,
               out(p.h) + (start + b) * s.H);
  }

  // The part of a thread in all steps.
  void run(int64_t thread, int64_t threads) const {
    const Share own = own_panels(thread, threads);
    C* gates = scratch.gates + thread * scratch.gates_size(s);
    C* z = scratch.z + thread * kLstmRows * 12 * s.Z;
    pack(own, thread, threads);
#pragma omp barrier
    for (int64_t t = 0, start = 0, last = 0; t < s.T; ++t) {
      const Step step = step_at(t, start, last);
      for (int64_t i = own.begin; i < own.end; ++i)  // there and back: half of them are still in the cache
        products(step, t % 2 ? own.begin + own.end - 1 - i : i);
#pragma omp barrier
      const Share rows(step.rows, thread, threads);
      for (int64_t b = rows.begin; b < rows.end; b += kLstmRows)
        cells(step, b, b + kLstmRows < rows.end ? b + kLstmRows : rows.end, gates, z);
#pragma omp barrier
      last = start, start += step.rows;
    }
  }
};

}  // namespace

namespace HYPERFAST_ISA {

void lstm(const Lstm& p, DType dtype, void* memory, int threads) {
  const auto run = [&](auto c) {
    using C = decltype(c);
    const LstmScratch<C> scratch(p.sizes, p.h_gates, threads, memory);
    with_width<C>(kMaxK, [&](auto simd) {
      const Sequence<C, decltype(simd)::width> sequence(p, scratch);
#pragma omp parallel num_threads(threads)
      sequence.run(omp_get_thread_num(), omp_get_num_threads());
    });
  };
  if (dtype == DType::float64) run(double());
  else run(float());
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
