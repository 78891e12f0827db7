// An LSTM, layer-norm LSTM or HyperLSTM over a whole packed sequence; equations: hyperfast/reference.py.
// Floor of a step of b rows: 2 b (4 H H + 4 M (H + M)) flops of recurrent products and 2 b 12 Z (M + H) of
// embeddings and scales, and the weights read once from the cache that holds them (5.7 MB in float32 at H
// 512, M 128, Z 16). One parallel region covers the sequence. A step has two phases with a barrier after
// each: the products, of which every thread makes the columns of the panels it owns, and everything else, row
// by row; the 12 H scales and offsets of a row live in registers only. At those sizes, 32 rows, layer norm,
// AVX-512, two cores: products 0.30 ms (290 GFLOPS), the rest 0.09.
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
  const LstmPackedParts<C> packed;
  const Norms<C> norms, hyper_norms;
  const DropoutScale<C> dropout, hyper_dropout;
  const DPanels d_panels;
  const int64_t hyper_panels, panels;  // of the gates of the two cells

  Sequence(const Lstm& p, const LstmScratch<C>& scratch)
      : p(p),
        s(p.sizes),
        scratch(scratch),
        packed(p.sizes, p.packed.weights, p.packed.scales),
        norms(p.weights.norms),
        hyper_norms(p.weights.hyper_norms),
        dropout(p.dropout, 0),
        hyper_dropout(p.dropout, 1),
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

  const C* panel_at(int64_t i) const {
    const int64_t hyper = i < hyper_panels ? i : hyper_panels;
    return packed.weights + (hyper * (s.H + s.M) + (i - hyper) * s.H) * kPanel;
  }

  static int lanes_at(int64_t width, int64_t j) { return int(width - j < W ? width - j : W); }

  // h_gates = weight_hh h, of the columns of a panel; packed panel `next` comes after it
  void products(const Step& step, int64_t i, int64_t next) const {
    if (i < hyper_panels) return hyper_products(step, i, next);
    const int64_t panel = i - hyper_panels, first = panel * kPanel, width = panel_width(4 * s.H, panel);
    C* to = step.h_gates + first;
    const auto finish = [&](int64_t b, int64_t j, auto sums) {
      store(S(), to + b * 4 * s.H + j, sums, lanes_at(width, j));
    };
    if (packed.weights)
      multiply_panel(S(), step.rows, {{step.h, s.H, s.H}}, panel_at(i), width, panel_at(next), finish);
    else
      multiply_columns(S(), step.rows, {{step.h, s.H, in(p.weights.weight_hh) + first * s.H, s.H, s.H}},
                       width, finish);
  }

  // hyper_gates = hyper_x_gates + hyper_weight_xh h + hyper_weight_hh hyper_h, likewise
  void hyper_products(const Step& step, int64_t panel, int64_t next) const {
    const int64_t first = panel * kPanel, width = panel_width(4 * s.M, panel);
    const C* x = in(p.hyper_x_gates) + step.start * 4 * s.M + first;
    C* to = step.hyper_gates + first;
    const auto finish = [&](int64_t b, int64_t j, auto sums) {
      const int64_t at = b * 4 * s.M + j;
      const int lanes = lanes_at(width, j);
      store(S(), to + at, load(S(), x + at, lanes) + sums, lanes);
    };
    if (packed.weights)
      return multiply_panel(S(), step.rows, {{step.h, s.H, s.H}, {step.hyper_h, s.M, s.M}}, panel_at(panel),
                            width, panel_at(next), finish);
    const C *xh = in(p.weights.hyper_weight_xh) + first * s.H,
            *hh = in(p.weights.hyper_weight_hh) + first * s.M;
    multiply_columns(S(), step.rows, {{step.h, s.H, xh, s.H, s.H}, {step.hyper_h, s.M, hh, s.M, s.M}}, width,
                     finish);
  }

  // z [rows, 12Z] of rows `first` on; z_columns: the same as LstmScratch::z_columns
  void embeddings(int64_t first, int64_t rows, C* z, C* z_columns) const {
    const C *bias = in(p.weights.z_bias), *hyper_h = in(p.hyper_h) + first * s.M;
    const auto finish = [&](int64_t b, int64_t j, auto sums, int lanes) {
      store(S(), z + b * 12 * s.Z + j, sums + load(S(), bias + j, lanes), lanes);
    };
    if (!packed.z_weight)
      return multiply_columns(
          S(), rows, {{hyper_h, s.M, in(p.weights.z_weight), s.M, s.M}}, 12 * s.Z,
          [&](int64_t b, int64_t j, auto sums) { finish(b, j, sums, lanes_at(12 * s.Z, j)); });
    for (int64_t panel = 0; panel < count_panels(12 * s.Z); ++panel)
      multiply_panel(S(), rows, hyper_h, s.M, packed.z_weight, s.M, 12 * s.Z, panel, finish);
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t i = 0; i < 12; ++i)
        for (int64_t k = 0; k < s.Z; ++k)
          z_columns[b / kZRows * 12 * s.Z * kZRows + ((i % 4 * s.Z + k) * 3 + i / 4) * kZRows + b % kZRows] =
              z[(b * 12 + i) * s.Z + k];
  }

  // d_x, d_h, d_b of P rows and one vector of columns: finish(row, d)
  template <int P, class Finish>
  void scales(const C* z, const C* d_weight, Finish finish) const {
    typename S::V d[P][3] = {};
    for (int64_t k = 0; k < s.Z; ++k)
      for (int place = 0; place < 3; ++place) {
        const auto w = S::load(d_weight + (place * s.Z + k) * kPanel);
        for (int b = 0; b < P; ++b) d[b][place] += z[(k * 3 + place) * kZRows + b] * w;
      }
#pragma GCC unroll 8
    for (int b = 0; b < P; ++b) finish(b, d[b]);
  }

  // The same for one row from weights that are not packed.
  void row_scales(const C* z, int64_t gate, int64_t first, typename S::V* d) const {
    for (int64_t place = 0; place < 3; ++place) {
      const int64_t i = place * 4 + gate;
      const C* d_weight = in(p.weights.d_weight) + (i * s.H + first) * s.Z;
      multiply_columns(S(), 1, {{z + i * s.Z, 0, d_weight, s.Z, s.Z}}, lanes_at(s.H, first),
                       [&](int64_t, int64_t, auto sums) { d[place] = sums; });
    }
  }

  // gates [rows, 4, padded H] = d_x x_gates + d_h h_gates + d_b + bias: x_gates and h_gates of these rows
  void modulate(int64_t rows, const C* z, const C* z_columns, const C* x_gates, const C* h_gates,
                C* gates) const {
    constexpr int held = sizeof(C) * W == 64 ? 8 : 4;
    const int64_t padded = round_up(s.H, kPanel);
    for (int64_t gate = 0; gate < 4; ++gate)
      for (int64_t first = 0; first < s.H; first += W) {
        const int lanes = lanes_at(s.H, first);
        const auto offset = load(S(), in(p.weights.bias) + gate * s.H + first, lanes);
        const auto finish = [&](int64_t b, const typename S::V* d) {
          const int64_t at = (b * 4 + gate) * s.H + first;
          S::store(gates + (b * 4 + gate) * padded + first, d[0] * load(S(), x_gates + at, lanes) +
                                                                d[1] * load(S(), h_gates + at, lanes) +
                                                                (d[2] + offset));
          __builtin_prefetch(x_gates + at + 2 * W);
          __builtin_prefetch(h_gates + at + 2 * W);
        };
        int64_t b = 0;
        if (!packed.z_weight)
          for (typename S::V d[3]; b < rows; ++b) {
            row_scales(z + b * 12 * s.Z, gate, first, d);
            finish(b, d);
          }
        const C* d_weight = d_panels.at(packed.d_weight, gate, first / kPanel) + first % kPanel;
        const auto block = [&](auto count) {
          for (; b + count <= rows; b += count)
            scales<count>(z_columns + (b / kZRows * 4 + gate) * s.Z * 3 * kZRows + b % kZRows, d_weight,
                          [&](int i, const typename S::V* d) { finish(b + i, d); });
        };
        block(std::integral_constant<int, held>());
        block(std::integral_constant<int, 2>());
        block(std::integral_constant<int, 1>());
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
  void cells(const Step& step, int64_t first, int64_t end, C* gates, C* z, C* z_columns) const {
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
      embeddings(start, rows, z, z_columns);
      modulate(rows, z, z_columns, x_gates, h_gates, gates);
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
    C* z = scratch.z + thread * scratch.z_size(s);
    C* z_columns = scratch.z_columns + thread * scratch.z_size(s);
    for (int64_t t = 0, start = 0, last = 0; t < s.T; ++t) {
      const Step step = step_at(t, start, last);
      const int64_t sign = t % 2 ? -1 : 1;  // there and back: some of them are still in the cache
      for (int64_t i = 0, count = own.end - own.begin; i < count; ++i) {
        const int64_t at = sign > 0 ? own.begin + i : own.end - 1 - i;
        products(step, at, i + 1 < count ? at + sign : at);
      }
#pragma omp barrier
      const Share rows(step.rows, thread, threads);
      for (int64_t b = rows.begin; b < rows.end; b += kLstmRows)
        cells(step, b, b + kLstmRows < rows.end ? b + kLstmRows : rows.end, gates, z, z_columns);
#pragma omp barrier
      last = start, start += step.rows;
    }
  }
};

// What lstm_pack does of panel i among all: those of the hyper LSTM's gates, of the LSTM's, of z_weight and
// of d_weight.
template <class C>
struct Packing {
  const LstmSizes& s;
  const LstmWeights& w;
  const LstmPackedParts<C> to;
  const DPanels d_panels{s.H, s.Z};
  const int64_t hyper = to.weights ? count_panels(4 * s.M) : 0;
  const int64_t gates = to.weights ? hyper + count_panels(4 * s.H) : 0;
  const int64_t z = to.z_weight ? gates + count_panels(12 * s.Z) : gates;
  const int64_t count = to.z_weight ? z + d_panels.count() : gates;

  static const C* in(const void* tensor) { return static_cast<const C*>(tensor); }
  void operator()(int64_t i) const {
    if (i < hyper) {
      C* panel = to.weights + i * (s.H + s.M) * kPanel;
      const int64_t first = i * kPanel, width = panel_width(4 * s.M, i);
      pack_columns(in(w.hyper_weight_xh) + first * s.H, 1, s.H, s.H, width, panel);
      pack_columns(in(w.hyper_weight_hh) + first * s.M, 1, s.M, s.M, width, panel + s.H * kPanel);
    } else if (i < gates) {
      pack_panel(in(w.weight_hh), 1, s.H, s.H, 4 * s.H, i - hyper,
                 to.weights + packed_size(s.H + s.M, 4 * s.M));
    } else if (i < z) {
      pack_panel(in(w.z_weight), 1, s.M, s.M, 12 * s.Z, i - gates, to.z_weight);
    } else {
      d_panels.pack(in(w.d_weight), i - z, to.d_weight);
    }
  }
};

}  // namespace

namespace HYPERFAST_ISA {

void lstm_pack(const LstmSizes& s, const LstmWeights& w, void* weights, void* scales, DType dtype,
               int threads) {
  const auto run = [&](auto c) {
    const Packing<decltype(c)> pack{s, w, {s, weights, scales}};
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < pack.count; ++i) pack(i);
  };
  if (dtype == DType::float64) run(double());
  else run(float());
}

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
