// The backward of an LSTM or HyperLSTM through time (hyperfast/reference.py, lstm_backward).
// Floor, flops of a step of B rows: 8 B H^2 + 8 B M H + 8 B M^2 for what dh and dhyper_h carry on, 24 B M Z
// for dz, 72 B H Z for d, dz and dd_weight; with B 32, H 512, M 128, Z 16: 108 million, 0.34 ms at the 320
// GFLOPS of two cores. Bytes: 19 H + 14 M + 24 Z numbers a row are read or written once.
//
// Columns of H are cut into panels, which belong to threads for the whole sequence: the carried dh and dc,
// the sums over rows and d_weight with its gradient stay in one core's cache, no sum depends on the number of
// threads, and only dh_gates and dz go from core to core. A step has up to five phases with a barrier after
// each: the gates' gradients by panel (three phases with layer norm, for its sums over a row), the hyper
// LSTM's by row, the products by panel. What does not depend on the step behind (the gates before
// normalisation, by the modulation recomputed from z) is done beside the products. At those sizes, AVX-512,
// two cores: products 0.30 ms (310 GFLOPS), the hyper LSTM 0.04, the rest 0.18; layer norm adds 0.08. With B
// 128, H 1000, M 128, Z 4 and layer norm, about 6.0 ms (floor 3.8): products 3.85, the hyper LSTM 0.1, the
// gates before normalisation 0.5, the phases with their gradients 0.25, 0.15 and 1.1. The stores of the last
// one took 1.4 ms by themselves before their lines were asked for ahead. Blocks of 16 to 64 rows, which the
// second cache would hold from phase to phase, win nothing.
#include "lstm_backward.h"

#include <omp.h>

#include "multiply.h"

namespace hyperfast {
namespace {

// ---- a cell, one row and any run of its units at a time

// Arrays of several quantities have the distance between two in `.._step`.
template <class C>
struct CellRow {
  int64_t n;       // units
  const C* gates;  // [4, n] before normalisation
  int64_t gates_step;
  const C *c, *c_before, *dh, *dh_output;  // dh_output: added to dh, or null
  C* dc;                                   // becomes that of the step before
  C* work;  // [kCellWork, n]: slopes of gates i, f, g by dc, do, forget gate, dc by h; the first four become
            // dgates
  int64_t work_step;
  const RowNorm<C>* norms;  // [5]: gates and c; null: none
  const C *gates_weight, *gates_bias, *cell_weight, *cell_bias;
  int64_t weight_step;
  C* sums;  // [kCellSums, n]: gates_weight, gates_bias, cell_weight, cell_bias
  int64_t sums_step;
  const DropoutScale<C>* dropout;  // or null
  int64_t row, column;             // of the first unit, for dropout
};

template <class C, int W>
struct Cell {
  using S = Simd<C, W>;
  using V = typename S::V;
  static constexpr S simd{};

  static V load(const C* p, int lanes) { return hyperfast::load(simd, p, lanes); }
  static void add(C* sum, V v) { S::store(sum, S::load(sum) + v); }
  // to[i] = the sum of the lanes of v[i], all together
  template <int count>
  static void sum(V (&v)[count], C* to) {
    sum_groups<W, count, W>(v);
    for (int i = 0; i < count; i += W) store(simd, to + i, v[i / W], std::min(W, count - i));
  }

  // The first pass: everything that needs no dc. totals [2]: what c's layer norm needs.
  template <bool normed>
  static void slopes(const CellRow<C>& r, C* totals) {
    V sums[2] = {};
    for_vectors<W>(r.n, [&](int64_t j, int lanes) {
      V gates[4], read = load(r.c + j, lanes), xhat{}, weight{};
      for (int k = 0; k < 4; ++k) {
        gates[k] = load(r.gates + k * r.gates_step + j, lanes);
        if (normed)
          gates[k] = normalised(gates[k], r.norms[k]) * load(r.gates_weight + k * r.weight_step + j, lanes) +
                     load(r.gates_bias + k * r.weight_step + j, lanes);
      }
      if (normed) {
        xhat = normalised(read, r.norms[4]), weight = load(r.cell_weight + j, lanes);
        read = xhat * weight + load(r.cell_bias + j, lanes);
      }
      const V i = sigmoid(simd, gates[0]), f = sigmoid(simd, gates[1]), o = sigmoid(simd, gates[3]);
      const V g = hyperfast::tanh(simd, gates[2]), tanh_c = hyperfast::tanh(simd, read);
      V dh = load(r.dh + j, lanes);
      if (r.dh_output) dh += load(r.dh_output + j, lanes);
      V by_h = dh * o * (C(1) - tanh_c * tanh_c);
      if (normed) {
        add(r.sums + 8 * r.sums_step + j, by_h * xhat);
        add(r.sums + 9 * r.sums_step + j, by_h);
        by_h *= weight;
        sums[0] += by_h;
        sums[1] += by_h * xhat;
      }
      const V scale = r.dropout ? r.dropout->at(simd, r.row, r.column + j) : V{} + C(1);
      const V scaled = i * scale;
      C* work = r.work + j;
      S::store(work, g * scaled * (C(1) - i));
      S::store(work + r.work_step, load(r.c_before + j, lanes) * f * (C(1) - f));
      S::store(work + 2 * r.work_step, scaled * (C(1) - g * g));
      S::store(work + 3 * r.work_step, dh * tanh_c * o * (C(1) - o));
      S::store(work + 4 * r.work_step, f);
      S::store(work + 5 * r.work_step, by_h);
    });
    if (normed) sum(sums, totals);
  }

  // The second: dc, and the gradients of the gates after normalisation. totals [4, 2]: what their norms need.
  template <bool normed>
  static void gradients(const CellRow<C>& r, C* totals) {
    V sums[8] = {};
    for_vectors<W>(r.n, [&](int64_t j, int lanes) {
      C* work = r.work + j;
      V by_h = S::load(work + 5 * r.work_step);
      if (normed) by_h = before_norm(by_h, load(r.c + j, lanes), r.norms[4]);
      const V dc = S::load(r.dc + j) + by_h;
      S::store(r.dc + j, dc * S::load(work + 4 * r.work_step));
      for (int k = 0; k < 4; ++k) {
        V g = S::load(work + k * r.work_step);
        if (k < 3) g *= dc;
        if (normed) {
          const V xhat = normalised(load(r.gates + k * r.gates_step + j, lanes), r.norms[k]);
          add(r.sums + k * r.sums_step + j, g * xhat);
          add(r.sums + (4 + k) * r.sums_step + j, g);
          g *= load(r.gates_weight + k * r.weight_step + j, lanes);
          sums[2 * k] += g;
          sums[2 * k + 1] += g * xhat;
        }
        S::store(work + k * r.work_step, g);
      }
    });
    if (normed) sum(sums, totals);
  }

  // The third: of a vector of gate k before normalisation.
  template <bool normed>
  static V dgate(const CellRow<C>& r, int k, int64_t j, int lanes) {
    const V g = S::load(r.work + k * r.work_step + j);
    return normed ? before_norm(g, load(r.gates + k * r.gates_step + j, lanes), r.norms[k]) : g;
  }

  static V normalised(V x, const RowNorm<C>& norm) { return (x - norm.mean) * norm.inverse; }
  static V before_norm(V g, V x, const RowNorm<C>& norm) {
    return norm.inverse * (g - norm.offset - normalised(x, norm) * norm.slope);
  }
};

// ---- the whole

template <class C, int W>
class Backward {
  using S = Simd<C, W>;
  using V = typename S::V;
  using Steps = Cell<C, W>;
  static constexpr S simd{};

  const LstmBackward& p;
  const LstmSizes& s;
  const LstmBackwardScratch<C>& scratch;
  const LstmBackwardPacked<C> packed;
  const LstmStrips strips;
  const DPanels d_panels;
  const bool normed, hyper_normed, hyper, streams;
  const C eps;
  const DropoutScale<C> dropout, hyper_dropout;

  template <class To = const C>
  static To* at(const void* tensor) {
    return static_cast<To*>(const_cast<void*>(tensor));
  }

 public:
  Backward(const LstmBackward& p, const LstmBackwardScratch<C>& scratch)
      : p(p),
        s(p.sizes),
        scratch(scratch),
        packed(p.sizes, p.packed.weights, p.packed.scales),
        strips(p.sizes.H),
        d_panels(p.sizes.H, p.sizes.Z),
        normed(p.weights.norms.gates_weight),
        hyper_normed(p.weights.hyper_norms.gates_weight),
        hyper(p.sizes.M),
        streams(p.sizes.H % W == 0 && (uintptr_t(p.dx_gates) | uintptr_t(p.dh_gates)) % (W * sizeof(C)) == 0),
        eps(C(p.eps)),
        dropout(p.dropout, 0),
        hyper_dropout(p.dropout, 1) {}

  // What every thread of a parallel region calls.
  void run(int64_t thread, int64_t threads) const {
    const Share mine(strips.count, thread, threads);
    Share panels = mine;
    panels.begin = strips.of(mine.begin).begin, panels.end = strips.of(mine.end).begin;
    const Step last = s.T ? step_at(s.T - 1, s.N - s.batch_sizes[s.T - 1]) : Step{};
    prepare(panels, thread, threads);
    pack_z(last, Share(ceil_div(last.size, kBackwardRows), thread, threads));
#pragma omp barrier
    if (normed) statistics(last, panels);
#pragma omp barrier
    int64_t start = s.N;
    for (int64_t t = s.T - 1; t >= 0; --t) {
      const int64_t size = s.batch_sizes[t];
      start -= size;
      const Step step = step_at(t, start);
      const Step behind = t ? step_at(t - 1, step.before) : Step{};
      if (normed) normed_gates(step, panels, thread);
      else plain_gates(step, panels, thread);
#pragma omp barrier
      if (hyper) {
        const Share blocks(ceil_div(size, kHyperRows), thread, threads);
        for (int64_t block = blocks.begin; block < blocks.end; ++block) hyper_rows(step, block, thread);
        pack_z(behind, Share(ceil_div(behind.size, kBackwardRows), thread, threads));
#pragma omp barrier
      }
      carry(step, panels, Share(count_panels(s.M), thread, threads), t % 2, thread);
      if (normed) statistics(behind, panels);
#pragma omp barrier
    }
    finish(panels, thread, threads);
    stream_fence();
  }

 private:
  // Rows `start` to `start + size`; `before`: the first one of the step before, or -1.
  struct Step {
    int64_t size, start, before;
  };
  Step step_at(int64_t t, int64_t start) const {
    return {s.batch_sizes[t], start, t ? start - s.batch_sizes[t - 1] : -1};
  }

  int64_t width(int64_t panel) const { return panel_width(s.H, panel); }
  const C* weights_of(int64_t panel) const { return packed.weights + panel * 4 * (s.H + s.M) * kPanel; }

  // ---- before and after all steps

  void prepare(const Share& panels, int64_t thread, int64_t threads) const {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      std::fill_n(scratch.sums + panel * kSums * kPanel, kSums * kPanel, C(0));
      begin_panel(at<>(p.dh_last), s.H, panel, scratch.dh + panel * s.B * kPanel, kPanel);
      begin_panel(at<>(p.dc_last), s.H, panel, scratch.dc + panel * s.B * kPanel, kPanel);
      if (hyper) std::fill_n(scratch.dd_weight + panel * 12 * s.Z * kPanel, 12 * s.Z * kPanel, C(0));
    }
    const Share small(count_panels(s.M), thread, threads);
    for (int64_t panel = small.begin; panel < small.end; ++panel) {
      begin_panel(at<>(p.dhyper_h_last), s.M, panel, scratch.dhyper_h + panel * kPanel, scratch.padded_M);
      begin_panel(at<>(p.dhyper_c_last), s.M, panel, scratch.dhyper_c + panel * kPanel, scratch.padded_M);
    }
    const Share blocks(scratch.hyper_blocks, thread, threads);
    const int64_t size = kCellSums * scratch.padded_M;
    std::fill_n(scratch.hyper_sums + blocks.begin * size, (blocks.end - blocks.begin) * size, C(0));
  }

  // A panel of from [B, n], or zeros, and zeros in the columns that pad it.
  void begin_panel(const C* from, int64_t n, int64_t panel, C* to, int64_t ldt) const {
    const int64_t columns = from ? std::min(kPanel, n - panel * kPanel) : 0;
    for (int64_t b = 0; b < s.B; ++b) {
      if (from) std::copy_n(from + b * n + panel * kPanel, columns, to + b * ldt);
      std::fill_n(to + b * ldt + columns, kPanel - columns, C(0));
    }
  }

  void finish(const Share& panels, int64_t thread, int64_t threads) const {
    void* const outputs[] = {p.dbias, p.dnorms[0], p.dnorms[1], p.dnorms[2], p.dnorms[3]};
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      const int64_t first = panel * kPanel, n = width(panel);
      for (int64_t b = 0; b < s.B; ++b) {
        std::copy_n(scratch.dh + (panel * s.B + b) * kPanel, n, at<C>(p.dh0) + b * s.H + first);
        std::copy_n(scratch.dc + (panel * s.B + b) * kPanel, n, at<C>(p.dc0) + b * s.H + first);
      }
      const C* sums = scratch.sums + panel * kSums * kPanel;
      for (int i = 0; i < (normed ? 5 : 1); ++i)
        for (int k = 0; k < (i < 3 ? 4 : 1); ++k, sums += kPanel)
          std::copy_n(sums, n, at<C>(outputs[i]) + k * s.H + first);
      for (int64_t place = 0; hyper && place < 12; ++place)
        for (int64_t z = 0; z < s.Z; ++z)
          for (int64_t h = 0; h < n; ++h)
            at<C>(p.dd_weight)[(place * s.H + first + h) * s.Z + z] =
                scratch.dd_weight[((panel * 12 + place) * s.Z + z) * kPanel + h];
    }
    const Share rows(s.B, thread, threads);
    for (int64_t b = rows.begin; hyper && b < rows.end; ++b) {
      std::copy_n(scratch.dhyper_h + b * scratch.padded_M, s.M, at<C>(p.dhyper_h0) + b * s.M);
      std::copy_n(scratch.dhyper_c + b * scratch.padded_M, s.M, at<C>(p.dhyper_c0) + b * s.M);
    }
    if (!hyper_normed || thread) return;
    const C* sums = scratch.hyper_sums;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < (i < 2 ? 4 : 1); ++k, sums += scratch.padded_M)
        for (int64_t m = 0; m < s.M; ++m) {
          C sum = 0;
          for (int64_t block = 0; block < scratch.hyper_blocks; ++block)
            sum += sums[block * kCellSums * scratch.padded_M + m];
          at<C>(p.dhyper_norms[i])[k * s.M + m] = sum;
        }
  }

  // ---- the LSTM's cell: tiles of a panel and at most kBackwardRows rows, [12, kBackwardRows, kPanel]

  C* tile_of(int64_t thread) const { return scratch.tile + thread * 12 * kBackwardRows * kPanel; }
  static C* place_of(C* tile, int64_t place) { return tile + place * kBackwardRows * kPanel; }

  // Calls f(panel, first row, rows) for all tiles of some panels: panel after panel of the same rows, so that
  // a row is read and written along its columns.
  template <class F>
  static void for_tiles(int64_t size, const Share& panels, F f) {
    for (int64_t b = 0; b < size; b += kBackwardRows)
      for (int64_t panel = panels.begin; panel < panels.end; ++panel)
        f(panel, b, std::min(kBackwardRows, size - b));
  }

  // A step's z as the tiles read it
  void pack_z(const Step& step, const Share& tiles) const {
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const int64_t first = tile * kBackwardRows, rows = std::min(kBackwardRows, step.size - first);
      const C* z = at<>(p.z) + (step.start + first) * 12 * s.Z;
      for (int64_t place = 0; place < 3; ++place)
        for (int64_t gate = 0; gate < 4; ++gate, z += s.Z) {
          C* to = z_of(first, gate) + place * kBackwardRows;
          for (int64_t row = 0; row < rows; ++row)
            for (int64_t k = 0; k < s.Z; ++k) to[k * 3 * kBackwardRows + row] = z[row * 12 * s.Z + k];
        }
    }
  }
  C* z_of(int64_t b, int64_t gate) const { return scratch.z + (b * 4 + gate * kBackwardRows) * 3 * s.Z; }

  // sum_z z d_weight of P rows, J vectors of columns and the first places: finish(row, column, sums)
  template <int P, int J, int places, class Finish>
  void scales(const C* z, const C* d, Finish finish) const {
    V acc[places][P][J] = {};
    const int64_t step = s.Z * kPanel;
    for (int64_t k = 0; k < s.Z; ++k, z += 3 * kBackwardRows, d += kPanel)
      for (int q = 0; q < places; ++q) {
        V columns[J];
        for (int j = 0; j < J; ++j) columns[j] = S::load(d + q * step + j * W);
        for (int row = 0; row < P; ++row)
          for (int j = 0; j < J; ++j) acc[q][row][j] += z[q * kBackwardRows + row] * columns[j];
      }
#pragma GCC unroll 4
    for (int row = 0; row < P; ++row)
#pragma GCC unroll 2
      for (int j = 0; j < J; ++j) {
        V sums[places];
        for (int q = 0; q < places; ++q) sums[q] = acc[q][row][j];
        finish(row, j * W, sums);
      }
  }

  // Of all rows and columns of a tile: finish(gate, row, column, lanes, sums of the first places)
  template <int places, class Finish>
  void modulate(int64_t panel, int64_t b, int64_t rows, Finish finish) const {
    constexpr int P = sizeof(C) * W == 64 ? 4 : 2;
    const int64_t n = width(panel);
    for (int64_t gate = 0; gate < 4; ++gate) {
      const C *z = z_of(b, gate), *d = d_panels.at(packed.d_panels, gate, panel);
      const auto strip = [&](auto vectors, int64_t first) {
        constexpr int J = decltype(vectors)::value;
        int64_t row = 0;
        const auto block = [&](auto count) {
          for (; row + count <= rows; row += count)
            scales<count, J, places>(z + row, d + first, [&](int64_t i, int64_t j, const V* sums) {
              finish(gate, row + i, first + j, int(std::min<int64_t>(W, n - first - j)), sums);
            });
        };
        block(std::integral_constant<int, P>());
        block(std::integral_constant<int, 1>());
      };
      int64_t j = 0;
      for (; j + W < n; j += 2 * W) strip(std::integral_constant<int, 2>(), j);
      if (j < n) strip(std::integral_constant<int, 1>(), j);
    }
  }

  // The gates before normalisation of a tile: row's to to(row) [4, kPanel]; d_x and d_h too, unless tile is
  // null.
  template <class To>
  void gates_before(const Step& step, int64_t panel, int64_t b, int64_t rows, C* tile, To to) const {
    const C* bias = at<>(p.weights.bias) + panel * kPanel;
    const int64_t first = (step.start + b) * 4 * s.H + panel * kPanel;
    const C *x_gates = at<>(p.x_gates) + first, *h_gates = at<>(p.h_gates) + first;
    if (hyper)
      return modulate<3>(panel, b, rows, [&](int64_t gate, int64_t row, int64_t j, int lanes, const V* d) {
        const int64_t element = (row * 4 + gate) * s.H + j;
        const V x = load(simd, x_gates + element, lanes);
        const V h = load(simd, h_gates + element, lanes);
        const V offset = d[2] + load(simd, bias + gate * s.H + j, lanes);
        S::store(to(row) + gate * kPanel + j, d[0] * x + d[1] * h + offset);
        if (!tile) return;
        S::store(place_of(tile, gate) + row * kPanel + j, d[0]);
        S::store(place_of(tile, 4 + gate) + row * kPanel + j, d[1]);
      });
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t gate = 0; gate < 4; ++gate)
        for_vectors<W>(width(panel), [&](int64_t j, int lanes) {
          const int64_t element = (row * 4 + gate) * s.H + j;
          S::store(to(row) + gate * kPanel + j, load(simd, x_gates + element, lanes) +
                                                    load(simd, h_gates + element, lanes) +
                                                    load(simd, bias + gate * s.H + j, lanes));
        });
  }

  // d_x and d_h of a tile, again
  void modulation(int64_t panel, int64_t b, int64_t rows, C* tile) const {
    modulate<2>(panel, b, rows, [&](int64_t gate, int64_t row, int64_t j, int, const V* d) {
      S::store(place_of(tile, gate) + row * kPanel + j, d[0]);
      S::store(place_of(tile, 4 + gate) + row * kPanel + j, d[1]);
    });
  }

  // What a tile reads is asked for while the one before it is computed: with row b that of the next panel, or
  // behind the last one the row kBackwardRows below. GCC would drop calls of functions that only ask.
  struct Next {
    int64_t panel, row;  // among all N
    int64_t before;      // the row of the step before
  };
  Next next_of(const Step& step, const Share& panels, int64_t panel, int64_t b) const {
    if (panel + 1 < panels.end) ++panel;
    else if (b + kBackwardRows < step.size) b += kBackwardRows, panel = panels.begin;
    return {panel, step.start + b, step.before < 0 ? step.start + b : step.before + b};
  }
  __attribute__((always_inline)) static void ask(const C* from) {
    for (int64_t i = 0; i < kPanel; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(from + i);
  }
  static void ask_to_write(C* to) {
    for (int64_t i = 0; i < kPanel; i += 64 / int64_t(sizeof(C))) prefetch_to_write(to + i);
  }
  __attribute__((always_inline)) void ask_gate(const Next& next, int64_t gate) const {
    const int64_t element = (next.row * 4 + gate) * s.H + next.panel * kPanel;
    ask(at<>(p.x_gates) + element);
    ask(at<>(p.h_gates) + element);
  }
  void ask_outputs(const Step& step, const Next& next, int64_t gate) const {
    const int64_t column = gate * s.H + next.panel * kPanel, element = next.row * 4 * s.H + column;
    ask_to_write(scratch.dh_gates + (next.row - step.start) * scratch.padded_gates + column);
    if (streams) return;
    ask_to_write(at<C>(p.dx_gates) + element);
    if (hyper) ask_to_write(at<C>(p.dh_gates) + element);
  }
  __attribute__((always_inline)) void ask_cell(const Next& next) const {
    const int64_t element = next.row * s.H + next.panel * kPanel;
    ask(at<>(p.c) + element);
    ask(at<>(p.c) + next.before * s.H + next.panel * kPanel);
    if (p.dh) ask(at<>(p.dh) + element);
  }

  CellRow<C> row_of(const Step& step, int64_t panel, int64_t b, C* work, const RowNorm<C>* norms) const {
    const int64_t column = panel * kPanel, element = (step.start + b) * s.H + column;
    const LstmNorms& w = p.weights.norms;
    const auto from_column = [&](const void* weight) { return normed ? at<>(weight) + column : nullptr; };
    CellRow<C> r{};
    r.n = width(panel);
    r.gates = work, r.gates_step = r.work_step = r.sums_step = kPanel;
    r.work = work + 4 * kPanel;
    r.c = at<>(p.c) + element;
    r.c_before =
        step.before < 0 ? at<>(p.c0) + b * s.H + column : at<>(p.c) + (step.before + b) * s.H + column;
    r.dh = scratch.dh + (panel * s.B + b) * kPanel;
    r.dh_output = p.dh ? at<>(p.dh) + element : nullptr;
    r.dc = scratch.dc + (panel * s.B + b) * kPanel;
    r.norms = norms;
    r.gates_weight = from_column(w.gates_weight), r.gates_bias = from_column(w.gates_bias);
    r.cell_weight = from_column(w.cell_weight), r.cell_bias = from_column(w.cell_bias);
    r.weight_step = s.H;
    r.sums = scratch.sums + (panel * kSums + 4) * kPanel;
    r.dropout = p.dropout.share ? &dropout : nullptr;
    r.row = step.start + b, r.column = column;
    return r;
  }

  // What is not read again here goes past the caches.
  void write(C* to, V v, int lanes) const {
    if (streams) S::stream(to, v);
    else store(simd, to, v, lanes);
  }

  // dx_gates, dh_gates and dbias of a row; in the tile dd takes the place of d.
  template <bool with_norm>
  void write_row(const Step& step, int64_t panel, int64_t b, const CellRow<C>& r, C* tile, int64_t row,
                 const Next& next) const {
    C* dbias = scratch.sums + panel * kSums * kPanel;
    for (int k = 0; k < 4; ++k) {
      ask_gate(next, k);
      ask_outputs(step, next, k);
      const int64_t column = k * s.H + panel * kPanel, element = (step.start + b) * 4 * s.H + column;
      C* kept = scratch.dh_gates + b * scratch.padded_gates + column;
      C* d = place_of(tile, k) + row * kPanel;
      for_vectors<W>(r.n, [&](int64_t j, int lanes) {
        const V g = Steps::template dgate<with_norm>(r, k, j, lanes);
        Steps::add(dbias + k * kPanel + j, g);
        V dx = g, dh = g;
        if (hyper) {
          C *d_x = d + j, *d_h = place_of(d_x, 4), *d_b = place_of(d_x, 8);
          dx *= S::load(d_x), dh *= S::load(d_h);
          S::store(d_x, g * load(simd, at<>(p.x_gates) + element + j, lanes));
          S::store(d_h, g * load(simd, at<>(p.h_gates) + element + j, lanes));
          S::store(d_b, g);
          write(at<C>(p.dh_gates) + element + j, dh, lanes);
        }
        write(at<C>(p.dx_gates) + element + j, dx, lanes);
        store(simd, kept + j, dh, lanes);
      });
    }
  }

  // From dd: the strip's share of dz, and dd_weight.
  void embeddings(int64_t panel, int64_t b, int64_t rows, C* tile) const {
    const int64_t padded = scratch.padded_Z, n = width(panel), strip = strips.holding(panel);
    const bool add = panel > strips.of(strip).begin;
    C* dz = scratch.dz + (strip * s.B + b) * 12 * padded;
    for (int64_t place = 0; place < 12; ++place) {
      const C *dd = place_of(tile, place), *d_rows = packed.d_rows + (panel * 12 + place) * kPanel * padded;
      with_width<C>(s.Z, [&](auto narrow) {
        multiply(narrow, rows, padded, dd, kPanel, int64_t(1), d_rows, padded, n,
                 [&](int64_t row, int64_t j, auto sums) {
                   C* to = dz + (row * 12 + place) * padded + j;
                   narrow.store(to, add ? narrow.load(to) + sums : sums);
                 });
      });
      C* total = scratch.dd_weight + (panel * 12 + place) * s.Z * kPanel;
      multiply(simd, s.Z, round_up(n, W), z_of(b, place % 4) + place / 4 * kBackwardRows, 3 * kBackwardRows,
               int64_t(1), dd, kPanel, rows,
               [&](int64_t k, int64_t j, V sums) { Steps::add(total + k * kPanel + j, sums); });
    }
  }

  void plain_gates(const Step& step, const Share& panels, int64_t thread) const {
    C *tile = tile_of(thread), *work = scratch.work + thread * kBackwardRows * kWork * kPanel;
    for_tiles(step.size, panels, [&](int64_t panel, int64_t b, int64_t rows) {
      gates_before(step, panel, b, rows, tile, [&](int64_t row) { return work + row * kWork * kPanel; });
      for (int64_t row = 0; row < rows; ++row) {
        const CellRow<C> r = row_of(step, panel, b + row, work + row * kWork * kPanel, nullptr);
        const Next next = next_of(step, panels, panel, b + row);
        ask_cell(next);
        Steps::template slopes<false>(r, nullptr);
        Steps::template gradients<false>(r, nullptr);
        write_row<false>(step, panel, b + row, r, tile, row, next);
      }
      if (hyper) embeddings(panel, b, rows, tile);
    });
  }

  // ---- the same with layer norm

  C* work_of(int64_t panel, int64_t b) const { return scratch.work + (panel * s.B + b) * kWork * kPanel; }

  // The gates before normalisation, and mean and sum of squared deviations of each panel.
  void statistics(const Step& step, const Share& panels) const {
    for_tiles(step.size, panels, [&](int64_t panel, int64_t b, int64_t rows) {
      gates_before(step, panel, b, rows, nullptr, [&](int64_t row) { return work_of(panel, b + row); });
      for (int64_t row = b; row < b + rows; ++row) {
        const C* gates = work_of(panel, row);
        const Next next = next_of(step, panels, panel, row);
        ask_cell(next);
        for (int64_t k = 0; k < 5; ++k) {
          if (k < 4) ask_gate(next, k);
          const C* x = k < 4 ? gates + k * kPanel : at<>(p.c) + (step.start + row) * s.H + panel * kPanel;
          C* to = scratch.statistics + (panel * 10 + k) * s.B + row;
          deviations(x, width(panel), to[0], to[5 * s.B]);
        }
      }
    });
  }

  static void deviations(const C* x, int64_t n, C& mean, C& squares) {
    V sum{};
    for_vectors<W>(n, [&](int64_t j, int lanes) { sum += load(simd, x + j, lanes); });
    mean = S::sum(sum) / C(n);
    const C center = mean;
    C rest = 0;
    V total{};
    for_vectors<W>(n, [&](int64_t j, int lanes) {
      const V d = load(simd, x + j, lanes) - center;
      if (lanes == W) total += d * d;
      else
        for (int i = 0; i < lanes; ++i) rest += (x[j + i] - center) * (x[j + i] - center);
    });
    squares = S::sum(total) + rest;
  }

  // Mean and inverse deviation of whole rows (Chan, Golub and LeVeque, 1979). Every thread combines all rows
  // for itself, here and in combine_sums: to share them would take one more barrier each time, for 2 numbers
  // a panel, row and norm.
  void combine_statistics(const Step& step, RowNorm<C>* norms) const {
    for (int64_t k = 0; k < 5; ++k)
      for_vectors<W>(step.size, [&](int64_t b, int lanes) {
        const C* from = scratch.statistics + k * s.B + b;
        V mean{}, squares{};
        for (int64_t panel = 0; panel < strips.panels; ++panel)
          mean += C(width(panel)) * load(simd, from + panel * 10 * s.B, lanes);
        mean /= C(s.H);
        for (int64_t panel = 0; panel < strips.panels; ++panel) {
          const V d = load(simd, from + panel * 10 * s.B, lanes) - mean;
          squares += load(simd, from + (panel * 10 + 5) * s.B, lanes) + C(width(panel)) * d * d;
        }
        C means[W], inverses[W];
        S::store(means, mean);
        S::store(inverses, C(1) / S::sqrt(squares / C(s.H) + eps));
        for (int i = 0; i < lanes; ++i) norms[(b + i) * 5 + k] = {means[i], inverses[i], 0, 0};
      });
  }

  // sums [panels, B, count, 2] to the norms from `first` on
  void combine_sums(const Step& step, const C* sums, int64_t first, int64_t count, RowNorm<C>* norms) const {
    for_vectors<W>(step.size * count * 2, [&](int64_t i, int lanes) {
      V sum{};
      for (int64_t panel = 0; panel < strips.panels; ++panel)
        sum += load(simd, sums + panel * s.B * count * 2 + i, lanes);
      C numbers[W];
      S::store(numbers, sum / C(s.H));
      for (int l = 0; l < lanes; ++l) {
        const int64_t at = (i + l) / 2;
        RowNorm<C>& norm = norms[at / count * 5 + first + at % count];
        ((i + l) % 2 ? norm.slope : norm.offset) = numbers[l];
      }
    });
  }

  void normed_gates(const Step& step, const Share& panels, int64_t thread) const {
    RowNorm<C>* norms = scratch.norms + thread * s.B * 5;
    const auto row_at = [&](int64_t panel, int64_t b) {
      return row_of(step, panel, b, work_of(panel, b), norms + b * 5);
    };
    const auto for_rows = [&](auto f) {
      for_tiles(step.size, panels, [&](int64_t panel, int64_t b, int64_t rows) {
        for (int64_t row = b; row < b + rows; ++row) f(panel, row);
      });
    };
    combine_statistics(step, norms);
    for_rows([&](int64_t panel, int64_t b) {
      ask_cell(next_of(step, panels, panel, b));
      Steps::template slopes<true>(row_at(panel, b), scratch.cell_sums + (panel * s.B + b) * 2);
    });
#pragma omp barrier
    combine_sums(step, scratch.cell_sums, 4, 1, norms);
    for_rows([&](int64_t panel, int64_t b) {
      Steps::template gradients<true>(row_at(panel, b), scratch.gate_sums + (panel * s.B + b) * 8);
    });
#pragma omp barrier
    combine_sums(step, scratch.gate_sums, 0, 4, norms);
    C* tile = tile_of(thread);
    for_tiles(step.size, panels, [&](int64_t panel, int64_t b, int64_t rows) {
      if (hyper) modulation(panel, b, rows, tile);
      for (int64_t row = 0; row < rows; ++row)
        write_row<true>(step, panel, b + row, row_at(panel, b + row), tile, row,
                        next_of(step, panels, panel, b + row));
      if (hyper) embeddings(panel, b, rows, tile);
    });
  }

  // ---- the hyper LSTM: dz, dhyper_gates and dhyper_c of a block of rows

  void hyper_rows(const Step& step, int64_t block, int64_t thread) const {
    const int64_t b = block * kHyperRows, rows = std::min(kHyperRows, step.size - b), M = s.M;
    const int64_t padded = scratch.padded_M;
    C* dz = at<C>(p.dz) + (step.start + b) * 12 * s.Z;
    for (int64_t row = 0; row < rows; ++row) sum_dz(b + row, dz + row * 12 * s.Z);
    for (int64_t panel = 0; panel < count_panels(M); ++panel)
      multiply_panel(simd, rows, dz, 12 * s.Z, packed.z_weight, 12 * s.Z, M, panel,
                     [&](int64_t row, int64_t j, V sums, int) {
                       Steps::add(scratch.dhyper_h + (b + row) * padded + j, sums);
                     });
    C* work = scratch.hyper_work + thread * kCellWork * padded;
    C* sums = scratch.hyper_sums + block * kCellSums * padded;
    for (int64_t row = 0; row < rows; ++row) {
      if (hyper_normed) hyper_row<true>(step, b + row, work, sums);
      else hyper_row<false>(step, b + row, work, sums);
    }
  }

  // dz of a row: the strips' shares, in order
  void sum_dz(int64_t b, C* dz) const {
    const int64_t padded = scratch.padded_Z, size = 12 * padded;
    C* sum = scratch.dz + b * size;
    for (int64_t strip = 1; strip < strips.count; ++strip) {
      const C* share = sum + strip * s.B * size;
      for (int64_t i = 0; i < size; ++i) sum[i] += share[i];
    }
    for (int64_t place = 0; place < 12; ++place) std::copy_n(sum + place * padded, s.Z, dz + place * s.Z);
  }

  template <bool with_norm>
  void hyper_row(const Step& step, int64_t b, C* work, C* sums) const {
    const int64_t M = s.M, row = step.start + b;
    const LstmNorms& w = p.weights.hyper_norms;
    RowNorm<C> norms[5];
    CellRow<C> r{};
    r.n = M;
    r.gates = at<>(p.hyper_gates) + row * 4 * M, r.gates_step = r.weight_step = M;
    r.work = work, r.work_step = r.sums_step = scratch.padded_M;
    r.c = at<>(p.hyper_c) + row * M;
    r.c_before = step.before < 0 ? at<>(p.hyper_c0) + b * M : at<>(p.hyper_c) + (step.before + b) * M;
    r.dh = scratch.dhyper_h + b * scratch.padded_M, r.dc = scratch.dhyper_c + b * scratch.padded_M;
    r.norms = norms;
    r.gates_weight = at<>(w.gates_weight), r.gates_bias = at<>(w.gates_bias);
    r.cell_weight = at<>(w.cell_weight), r.cell_bias = at<>(w.cell_bias);
    r.sums = sums;
    r.dropout = p.dropout.share ? &hyper_dropout : nullptr;
    r.row = row;
    for (int k = 0; with_norm && k < 5; ++k) {
      const RowStatistics<C> found(simd, k < 4 ? r.gates + k * M : r.c, M, eps);
      norms[k] = {found.mean, found.inverse, 0, 0};
    }
    C totals[8];
    const auto take = [&](int k, const C* from) {
      norms[k].offset = from[0] / C(M), norms[k].slope = from[1] / C(M);
    };
    Steps::template slopes<with_norm>(r, totals);
    if (with_norm) take(4, totals);
    Steps::template gradients<with_norm>(r, totals);
    for (int k = 0; with_norm && k < 4; ++k) take(k, totals + 2 * k);
    C* dgates = at<C>(p.dhyper_gates) + row * 4 * M;
    for (int k = 0; k < 4; ++k)
      for_vectors<W>(M, [&](int64_t j, int lanes) {
        store(simd, dgates + k * M + j, Steps::template dgate<with_norm>(r, k, j, lanes), lanes);
      });
  }

  // ---- the products

  void carry(const Step& step, const Share& panels, const Share& small, bool down, int64_t thread) const {
    const C* dhyper_gates = at<>(p.dhyper_gates) + step.start * 4 * s.M;
    const Factor<C> by_h{scratch.dh_gates, scratch.padded_gates, 4 * s.H};
    const Factor<C> by_hyper{dhyper_gates, 4 * s.M, 4 * s.M};
    if (packed.weights) multiply_packed(step, panels, by_h, by_hyper, down);
    for (int64_t panel = panels.begin; !packed.weights && panel < panels.end; ++panel) {
      multiply_unpacked(step, panel, by_h, p.weights.weight_hh, false, thread);
      multiply_unpacked(step, panel, by_hyper, p.weights.hyper_weight_xh, true, thread);
    }
    for (int64_t panel = small.begin; panel < small.end; ++panel)
      multiply_panel(simd, step.size, dhyper_gates, 4 * s.M, packed.hyper_weight_hh, 4 * s.M, s.M, panel,
                     [&](int64_t row, int64_t j, V sums, int) {
                       S::store(scratch.dhyper_h + row * scratch.padded_M + j, sums);
                     });
  }

  // dh of some panels. Pieces of the factors that the second cache holds meet all panels in turn; every other
  // step goes backwards, for what was used last is still in the cache.
  void multiply_packed(const Step& step, const Share& panels, const Factor<C>& by_h,
                       const Factor<C>& by_hyper, bool down) const {
    constexpr int64_t held = 1024 / sizeof(C);
    const int64_t count = panels.end - panels.begin, of_h = ceil_div(by_h.K, held);
    const int64_t pieces = (of_h + ceil_div(by_hyper.K, held)) * count;
    // where the weights of the i-th piece begin, and its factor
    const auto piece = [&](int64_t i, int64_t& panel, Factor<C>& factor) {
      if (down) i = pieces - 1 - i;
      panel = panels.begin + i % count, i /= count;
      const bool first = i < of_h;
      const int64_t k = (first ? i : i - of_h) * held;
      factor = first ? by_h : by_hyper;
      factor.a += k, factor.K = std::min(held, factor.K - k);
      return weights_of(panel) + (first ? k : by_h.K + k) * kPanel;
    };
    for (int64_t i = 0; i < pieces; ++i) {
      int64_t panel, next_panel;
      Factor<C> factors[1], next_factor;
      const C* weights = piece(i, panel, factors[0]);
      const C* next = piece(i + 1 < pieces ? i + 1 : i, next_panel, next_factor);
      const bool adds = i >= count;
      C* dh = scratch.dh + panel * s.B * kPanel;
      multiply_panel(simd, step.size, factors, weights, width(panel), next,
                     [&](int64_t row, int64_t j, V sums) {
                       C* to = dh + row * kPanel + j;
                       S::store(to, adds ? S::load(to) + sums : sums);
                     });
    }
  }

  // dh (+)= the product with a panel of weight [factor.K, H], of which pieces are packed for this call alone.
  void multiply_unpacked(const Step& step, int64_t panel, const Factor<C>& factor, const void* weight,
                         bool adds, int64_t thread) const {
    C* dh = scratch.dh + panel * s.B * kPanel;
    constexpr int64_t held = 12 * kBackwardRows;
    C* piece = tile_of(thread);
    for (int64_t k = 0; k < factor.K; k += held, adds = true) {
      const int64_t end = std::min(k + held, factor.K);
      pack_columns(at<>(weight) + k * s.H + panel * kPanel, s.H, 1, end - k, width(panel), piece);
      multiply(simd, step.size, round_up(width(panel), W), factor.a + k, factor.lda, int64_t(1), piece,
               kPanel, end - k, [&](int64_t row, int64_t j, V sums) {
                 C* to = dh + row * kPanel + j;
                 S::store(to, adds ? S::load(to) + sums : sums);
               });
    }
  }
};

// What lstm_backward_pack does of panel i among all: those of the products with dh_gates and dhyper_gates, of
// d_weight in both layouts, of hyper_weight_hh and z_weight.
template <class C>
struct Packing {
  const LstmSizes& s;
  const LstmWeights& w;
  const LstmBackwardPacked<C> to;
  const DPanels d_panels{s.H, s.Z};
  const int64_t count = d_panels.panels;
  const int64_t small = count_panels(s.M);

  static const C* in(const void* tensor) { return static_cast<const C*>(tensor); }
  void operator()(int64_t panel) const {
    const int64_t width = panel_width(s.H, panel);
    if (to.weights) {
      C* at = to.weights + panel * 4 * (s.H + s.M) * kPanel;
      pack_columns(in(w.weight_hh) + panel * kPanel, s.H, 1, 4 * s.H, width, at);
      if (s.M)
        pack_columns(in(w.hyper_weight_xh) + panel * kPanel, s.H, 1, 4 * s.M, width, at + 4 * s.H * kPanel);
    }
    if (!s.M) return;
    for (int64_t gate = 0; gate < 4; ++gate)
      d_panels.pack(in(w.d_weight), gate * d_panels.panels + panel, to.d_panels);
    const int64_t padded = padded_embedding(s.Z);
    C* rows = to.d_rows + panel * 12 * kPanel * padded;
    for (int64_t place = 0; place < 12; ++place)
      for (int64_t h = 0; h < kPanel; ++h, rows += padded) {
        const int64_t columns = h < width ? s.Z : 0;
        std::copy_n(in(w.d_weight) + (place * s.H + panel * kPanel + h) * s.Z, columns, rows);
        std::fill_n(rows + columns, padded - columns, C(0));
      }
  }
  void hyper(int64_t panel) const {
    pack_panel(in(w.hyper_weight_hh), s.M, 1, 4 * s.M, s.M, panel, to.hyper_weight_hh);
    pack_panel(in(w.z_weight), s.M, 1, 12 * s.Z, s.M, panel, to.z_weight);
  }
};

}  // namespace

namespace HYPERFAST_ISA {

void lstm_backward_pack(const LstmSizes& s, const LstmWeights& w, void* weights, void* scales, DType dtype,
                        int threads) {
  const auto run = [&](auto c) {
    const Packing<decltype(c)> pack{s, w, {s, weights, scales}};
#pragma omp parallel num_threads(threads)
    {
#pragma omp for nowait
      for (int64_t i = 0; i < pack.count; ++i) pack(i);
#pragma omp for
      for (int64_t i = 0; i < pack.small; ++i) pack.hyper(i);
    }
  };
  if (dtype == DType::float64) run(double());
  else run(float());
}

void lstm_backward(const LstmBackward& p, DType dtype, void* memory, int threads) {
  const auto run = [&](auto t) {
    using C = decltype(t);
    const LstmBackwardScratch<C> scratch(p.sizes, p.weights.norms.gates_weight, threads, memory);
    with_width<C>(kMaxK, [&](auto simd) {
      const Backward<C, decltype(simd)::width> backward(p, scratch);
#pragma omp parallel num_threads(threads)
      backward.run(omp_get_thread_num(), omp_get_num_threads());
    });
  };
  if (dtype == DType::float64) run(double());
  else run(float());
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
