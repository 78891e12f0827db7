// y = x w^T + layer_bias and its gradients with w = weight z + bias generated a tile at a time, in cache.
// Floor: the generator's N K numbers are read once, in the forward and in the backward; x, y and their
// gradients are small for the few rows this is for. Against generating first it saves writing the N weights
// to fresh memory and reading them again. 512 -> 1024, K = 16, float32, one row, two cores: 690 us, where
// summing the generator takes 670 and generating alone 710. Work is cut into units whose number and sums
// depend on the sizes alone, not on the threads. Asking for the next tile's part of the generator while
// multiplying gained nothing; asking for the rows of x that come next gained 5 %.
#include "hyper_linear.h"

#include "multiply.h"
#include "rows.h"

namespace hyperfast {
namespace {

// ---- forward: a tile has kTileOutputs outputs of kTileColumns columns; a unit is a strip of outputs
// --------

// y[m, o] (+)= x[m, :] . tile[o, :] + start[o] for M rows and O outputs held in registers; `lanes` of y
// wanted
template <int M, int O, class C, int W>
void dot_rows(Simd<C, W>, const C* x, int64_t ldx, const C* tile, int64_t cols, C* y, int64_t ldy, int lanes,
              const C* start, bool add) {
  using S = Simd<C, W>;
  typename S::V acc[M][O] = {};
  for (int64_t i = 0; i < cols; i += W) {
    typename S::V xs[M];
    for (int m = 0; m < M; ++m) xs[m] = S::load(x + m * ldx + i);
    for (int m = 0; m < M; ++m) __builtin_prefetch(x + (M + m) * ldx + i);  // the rows that come next
    for (int o = 0; o < O; ++o) {
      const auto w = S::load(tile + o * cols + i);
      for (int m = 0; m < M; ++m) acc[m][o] += xs[m] * w;
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) {
    sum_groups<W, O, W>(acc[m]);
#pragma GCC unroll 8
    for (int o = 0; o < O; o += W) {
      const int n = lanes - o < W ? lanes - o : W;
      if (n <= 0) break;
      auto sum = acc[m][o / W];
      if (add) sum += S::load(y + m * ldy + o, n);
      else if (start) sum += S::load(start + o, n);
      S::store(y + m * ldy + o, sum, n);
    }
  }
}

template <class C, int W>
void multiply_tile(Simd<C, W> simd, const HyperLinearSizes& s, const C* x, const C* tile, int64_t cols, C* y,
                   int outputs, const C* start, bool add) {
  constexpr int held = sizeof(C) * W == 64 ? 8 : 4;  // outputs in registers: 24 or 12 sums
  const int64_t ldx = s.padded(), ldy = s.G * s.O;
  int64_t m = 0;
  const auto rows = [&](auto count) {
    constexpr int M = decltype(count)::value;
    for (int o = 0; o < outputs; o += held)
      dot_rows<M, held>(simd, x + m * ldx, ldx, tile + o * cols, cols, y + m * ldy + o, ldy,
                        outputs - o < held ? outputs - o : held, start ? start + o : nullptr, add);
    m += M;
  };
  while (m + 3 <= s.M) rows(std::integral_constant<int, 3>());
  while (m < s.M) rows(std::integral_constant<int, 1>());
}

template <class T>
void forward_strip(const HyperLinear& p, const ForwardUnits& units, int64_t unit, compute_t<T>* partial) {
  using C = compute_t<T>;
  const HyperLinearSizes& s = p.sizes;
  const int64_t chunk = unit % units.chunks, strip = unit / units.chunks;
  const int64_t g = strip / units.strips, o = strip % units.strips * kTileOutputs;
  const int64_t first = chunk * units.chunk_columns;
  const int64_t end = first + units.chunk_columns < s.I ? first + units.chunk_columns : s.I;
  const int outputs = int(s.O - o < kTileOutputs ? s.O - o : kTileOutputs);
  const PaddedZ<T> z(p.z, s.K);
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  const C* x = static_cast<const C*>(p.x) + g * s.M * s.padded();
  C* y = partial ? partial + chunk * s.M * s.G * s.O : static_cast<C*>(p.y);
  const C* start = partial ? nullptr : static_cast<const C*>(p.layer_bias);
  alignas(64) C tile[kTileOutputs * kTileColumns];
  for (int64_t i = first; i < end; i += kTileColumns) {
    const int64_t columns = end - i < kTileColumns ? end - i : kTileColumns;
    const int64_t padded = round_up(columns, kColumnPad);
    for (int r = 0; r < kTileOutputs; ++r) {
      C* row = tile + r * padded;
      const int64_t made = r < outputs ? columns : 0, n = ((g * s.O + o + r) * s.I + i);
      if (made) generate_rows(weight + n * s.K, bias ? bias + n : nullptr, z.values, s.K, made, row);
      for (int64_t j = made; j < padded; ++j) row[j] = 0;
    }
    with_width<C>(kMaxK, [&](auto simd) {
      multiply_tile(simd, s, x + i, tile, padded, y + g * s.O + o, outputs,
                    start ? start + g * s.O + o : nullptr, i > first);
    });
  }
}

// ---- backward: a unit is a strip of columns of some outputs, walked in tiles of kStripOutputs
// --------------

// dx: where the unit adds up [M, padded I] of its group, or null; dz: its sums [K], or null
template <class T>
void backward_strip(const HyperLinearBackward& p, const BackwardUnits& units, int64_t unit, compute_t<T>* dx,
                    double* dz) {
  using C = compute_t<T>;
  const HyperLinearSizes& s = p.sizes;
  const int64_t split = unit % units.splits, strip = unit / units.splits;
  const int64_t g = strip / units.strips, i = strip % units.strips * kStripColumns;
  const int64_t columns = s.I - i < kStripColumns ? s.I - i : kStripColumns;
  const int64_t padded = round_up(columns, kColumnPad), ldx = s.padded();
  const int64_t first = split * units.split_outputs;
  const int64_t end = first + units.split_outputs < s.O ? first + units.split_outputs : s.O;
  const int64_t ahead = columns < s.I ? s.I * s.K * int64_t(sizeof(T)) : kAhead;  // the next output's columns
  const PaddedZ<T> z(p.z, s.K);
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  const C* x = static_cast<const C*>(p.x) + g * s.M * ldx + i;
  alignas(64) C w[kStripOutputs * kStripColumns], dw[kStripOutputs * kStripColumns];
  if (dz)
    for (int64_t k = 0; k < s.K; ++k) dz[k] = 0;
  for (int64_t o = first; o < end; o += kStripOutputs) {
    const int64_t outputs = end - o < kStripOutputs ? end - o : kStripOutputs;
    const C* dy = static_cast<const C*>(p.dy) + (g * s.O + o) * s.M;
    if (dz || p.dw) multiply_add(dw, padded, outputs, padded, dy, s.M, 1, x, ldx, s.M, false);
    for (int64_t r = 0; r < outputs; ++r) {
      const int64_t n = (g * s.O + o + r) * s.I + i;
      C *w_row = w + r * padded, *dw_row = dw + r * padded;
      if (dx)
        generate_rows(weight + n * s.K, bias ? bias + n : nullptr, z.values, s.K, columns, w_row, ahead);
      if (dz)
        with_width<T>(s.K, [&](auto simd) {
          add_weighted_rows(simd, weight + n * s.K, dw_row, s.K, columns, dz, ahead);
        });
      if (dx)
        for (int64_t j = columns; j < padded; ++j) w_row[j] = 0;
      if (p.dw)
        for (int64_t j = 0; j < columns; ++j) static_cast<T*>(p.dw)[n + j] = narrow<T>(dw_row[j]);
    }
    if (dx) multiply_add(dx + i, ldx, s.M, padded, dy, 1, s.M, w, padded, outputs, o > first);
  }
}

// to[j] = start[j % period] + parts[0][j] + parts[1][j] + ..., in this order
template <class C>
void sum_parts(C* to, const C* parts, int64_t count, int64_t size, const C* start, int64_t period,
               int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t j = 0; j < size; ++j) {
    C sum = start ? start[j % period] : 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * size + j];
    to[j] = sum;
  }
}

}  // namespace

namespace HYPERFAST_ISA {

void hyper_linear(const HyperLinear& p, DType dtype, void* scratch, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    const HyperLinearSizes& s = p.sizes;
    const ForwardUnits units(s);
    C* partial = units.chunks > 1 ? static_cast<C*>(scratch) : nullptr;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (units.count > 1)
    for (int64_t unit = 0; unit < units.count; ++unit) forward_strip<T>(p, units, unit, partial);
    if (partial)
      sum_parts(static_cast<C*>(p.y), partial, units.chunks, s.M * s.G * s.O,
                static_cast<const C*>(p.layer_bias), s.G * s.O, threads);
  });
}

void hyper_linear_backward(const HyperLinearBackward& p, DType dtype, void* scratch, int threads) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    const HyperLinearSizes& s = p.sizes;
    const BackwardUnits units(s);
    const int64_t group = s.M * s.padded(), size = s.G * group;
    double* dzs = static_cast<double*>(scratch);
    C* partial = reinterpret_cast<C*>(dzs + units.count * s.K);
    C* dx = units.splits > 1 ? partial : static_cast<C*>(p.dx);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (units.count > 1)
    for (int64_t unit = 0; unit < units.count; ++unit) {
      const int64_t split = unit % units.splits, g = unit / units.splits / units.strips;
      backward_strip<T>(p, units, unit, p.dx ? dx + split * size + g * group : nullptr,
                        p.dz ? dzs + unit * s.K : nullptr);
    }
    if (p.dx && units.splits > 1)
      sum_parts<C>(static_cast<C*>(p.dx), partial, units.splits, size, nullptr, 1, threads);
    if (p.dz)
      for (int64_t k = 0; k < s.K; ++k) {
        double sum = 0;
        for (int64_t unit = 0; unit < units.count; ++unit) sum += dzs[unit * s.K + k];
        static_cast<T*>(p.dz)[k] = narrow<T>(C(sum));
      }
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
