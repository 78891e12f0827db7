// lstm_backward: the gradients through time in one launch; hyperfast.reference.lstm_backward has the
// equations. Read lstm.cu first: matrices on chip, cooperative launch, barriers and CUDA graphs are the same
// here.
//
// A step, from the last to the first, again is two phases with a barrier of the grid after each:
//
//   rows      a block takes whole rows: gates, activations and norms recomputed from what the forward kept,
//             back through the main cell, dz, dhyper_h, the hyper cell. What a row adds to the gradients of
//             bias and norms goes to sums of its block's own in L2 (14 H + 10 M, by the thread that owns the
//             unit).
//   products  each gate's part of dh and dhyper_h of the step before (lstm.cuh); and every block adds the
//             step to dd_weight of its own units, whose sums stay in shared memory to the end: [12, H, Z] for
//             each block of rows would be 393 KB a row and step.
//
// After the last step the blocks add up the blocks' sums, in order. The carried dc lives in dc0 and
// dhyper_c0.
//
// Physics, as in lstm.cu: predicted, nothing measured. B 32, H 512, M 128, Z 16: products 3.5 us, dd_weight
// 1, rows read d_weight twice (7.9 us) and about 4 for the rest, barriers 3: 19 us a step. B 128, H 1000, M
// 128, Z 4: 36 + 2 + 14 + 3: 55 us. The rule of lstm.cu holds here too. Served: H up to about 1000 in float32
// (M 128, Z 16), 1440 in half precision on an H100; larger ones are refused (lstm_refuses), forward and
// backward alone.
#include "lstm.cuh"

namespace hyperfast::cuda {
namespace {

// Where the blocks meet in memory; floats of each below.
struct Exchange {
  float* gradients;   // [4, K, pitch]: of each gate dh_gates and dhyper_gates, k first
  float* products;    // [4, B, K]: each gate's part of dh and dhyper_h of the step before
  float* dgates;      // [B, 4H]: before they are scaled; hyper only, like the next
  float* modulation;  // [row blocks, 8H]: d_x and d_h of a row, its block's own
  float* sums;        // [row blocks, 14H + 10M]: what each block adds up for bias and norms
};

Exchange exchange_of(const LstmPlan& s, float* scratch) {
  const LstmBackwardFloats floats(s);
  Exchange x;
  x.gradients = scratch;
  x.products = x.gradients + floats.gradients;
  x.dgates = x.products + floats.products;
  x.modulation = x.dgates + floats.dgates;
  x.sums = x.modulation + floats.modulation;
  return x;
}

// What a block adds up over its rows, in Exchange::sums; unit u's numbers are thread u % kLstmThreads' own.
struct NormSums {
  float *gates_weight, *gates_bias, *cell_weight, *cell_bias;  // [4n] twice, [n] twice
};
__device__ __forceinline__ NormSums norm_sums(float* at, int n) {
  return {at, at + 4 * n, at + 8 * n, at + 9 * n};
}

// A row's c, of the step itself and of the one before, and where the gradient of c is carried.
struct CellStates {
  const float *c, *c_before;
  const float* dc_in;  // null: zero
  float* dc_out;
};

// Through one cell: emit(unit, gradients of its four gates before normalisation) from dh(unit). gates [4n] in
// shared memory: before normalisation, unit u's by thread u % kLstmThreads; work [5n]. Writes over both. By
// all threads.
template <class D, class E>
__device__ void cell_backward(const LstmPlan& s, const CellShape& cell, float eps, const int64_t* key,
                              int64_t row, float* gates, float* work, const CellStates& states,
                              const NormSums& total, BlockSums& sums, D dh, E emit) {
  const int n = cell.n;
  const bool norms = cell.gates_weight;
  const float share = 1.0f / static_cast<float>(n);
  float mean[5] = {}, inverse[5] = {1, 1, 1, 1, 1}, of_cell[2] = {}, of_gates[8] = {};
  float* dread = work + 4 * n;
  if (norms)
    statistics(sums, n, eps, mean, inverse,
               [&](int i, int u) { return i < 4 ? gates[i * n + u] : states.c[u]; });
  const auto normed = [&](int u) { return (states.c[u] - mean[4]) * inverse[4]; };
#pragma unroll 1
  for (int u = thread_number(); u < n; u += kLstmThreads) {
    float a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = gates[i * n + u] = (gates[i * n + u] - mean[i]) * inverse[i];
      if (norms) a[i] = multiply_add(a[i], cell.gates_weight[i * n + u], cell.gates_bias[i * n + u]);
    }
    const float c = normed(u), o = sigmoid(a[3]), gradient = dh(u);
    const float read = tanhf(norms ? multiply_add(c, cell.cell_weight[u], cell.cell_bias[u]) : c);
    float d = gradient * o * (1 - read * read);
    work[u] = sigmoid(a[0]), work[n + u] = sigmoid(a[1]), work[2 * n + u] = tanhf(a[2]);
    work[3 * n + u] = gradient * read * o * (1 - o);
    if (norms) {
      total.cell_weight[u] += d * c, total.cell_bias[u] += d;
      d *= cell.cell_weight[u];
      of_cell[0] += d, of_cell[1] += d * c;
    }
    dread[u] = d;
  }
  if (norms) sums(of_cell);
#pragma unroll 1
  for (int u = thread_number(); u < n; u += kLstmThreads) {
    float dc = states.dc_in ? states.dc_in[u] : 0.0f;
    dc += (dread[u] - of_cell[0] * share - normed(u) * of_cell[1] * share) * inverse[4];
    const float i = work[u], f = work[n + u], g = work[2 * n + u];
    const float scale = dropout_scale(s, key, row, u, cell.stream);
    const float d[4] = {dc * g * scale * i * (1 - i), dc * states.c_before[u] * f * (1 - f),
                        dc * i * scale * (1 - g * g), work[3 * n + u]};
    states.dc_out[u] = dc * f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float da = d[j];
      if (norms) {
        const float x = gates[j * n + u];
        total.gates_weight[j * n + u] += da * x, total.gates_bias[j * n + u] += da;
        da *= cell.gates_weight[j * n + u];
        of_gates[j] += da, of_gates[4 + j] += da * x;
      }
      work[j * n + u] = da;
    }
  }
  if (norms) sums(of_gates);
#pragma unroll 1
  for (int u = thread_number(); u < n; u += kLstmThreads) {
    float d[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      d[j] =
          (work[j * n + u] - of_gates[j] * share - gates[j * n + u] * of_gates[4 + j] * share) * inverse[j];
    emit(u, d);
  }
}

// A row of a step: its number in the batch and among all; that of the step before, negative: c0; whether it
// is the last step of its sequence.
struct Row {
  int b;
  int64_t at, before;
  bool last;
};

__device__ __forceinline__ CellStates cell_states(const Row& row, int n, const void* c, const void* c0,
                                                  const void* dc_last, void* dc0) {
  const int64_t own = static_cast<int64_t>(row.b) * n;
  float* carried = static_cast<float*>(dc0) + own;
  const float* given = dc_last ? static_cast<const float*>(dc_last) + own : nullptr;
  return {
      static_cast<const float*>(c) + row.at * n,
      row.before < 0 ? static_cast<const float*>(c0) + own : static_cast<const float*>(c) + row.before * n,
      row.last ? given : carried, carried};
}

// The gradient of h (k < H) or hyper_h that reaches a row from the step after it.
__device__ __forceinline__ float carried(const LstmPlan& s, const Exchange& x, int b, int k) {
  float sum = 0;
#pragma unroll
  for (int part = 0; part < 4; ++part) sum += x.products[(static_cast<int64_t>(part) * s.B + b) * s.K + k];
  return sum;
}

template <class T>
__device__ __forceinline__ float carried_or_last(const LstmPlan& s, const Exchange& x, const Row& row, int k,
                                                 const void* last, int n, int unit) {
  if (!row.last) return carried(s, x, row.b, k);
  return last ? widen<T>(last, static_cast<int64_t>(row.b) * n + unit) : 0.0f;
}

// Shared memory of a row.
struct RowMemory {
  float *gates, *work, *z, *dz_parts, *dz, *dh_parts;
  __device__ RowMemory(const LstmPlan& s, float* memory) {
    const int larger = s.H > s.M ? s.H : s.M;
    gates = memory, work = gates + 4 * larger, z = work + 5 * larger, dz_parts = z + 12 * s.Z;
    dz = dz_parts + 4 * 12 * s.Z, dh_parts = dz + 12 * s.Z;  // [4, M], then dhyper_h [M]
  }
};

// The main LSTM's part of a row. Leaves dgates [4H] in m.work with a hyper LSTM.
template <class T>
__device__ void main_row(const LstmBackward& p, const LstmPlan& s, const Exchange& x, const Row& row,
                         const RowMemory& m, BlockSums& sums) {
  const int H = s.H;
  float* scales = x.modulation + static_cast<int64_t>(blockIdx.x) * 8 * H;
  float* dbias = x.sums + static_cast<int64_t>(blockIdx.x) * (14 * H + 10 * s.M);
#pragma unroll 1
  for (int u = thread_number(); u < H; u += kLstmThreads)
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row.at * 4 * H + i * H + u, unit = static_cast<int64_t>(i) * H + u;
      const float x_gate = widen<T>(p.x_gates, at), h_gate = widen<T>(p.h_gates, at);
      float gate = widen<T>(p.weights.bias, i * H + u);
      if (s.M) {
        const int64_t place = static_cast<int64_t>(4) * H;
        const float* z = m.z + i * s.Z;
        const float d_x = modulate<T>(s, p.weights.d_weight, unit, z);
        const float d_h = modulate<T>(s, p.weights.d_weight, unit + place, z + 4 * s.Z);
        gate += modulate<T>(s, p.weights.d_weight, unit + 2 * place, z + 8 * s.Z);
        gate += d_x * x_gate + d_h * h_gate;
        scales[i * H + u] = d_x, scales[(4 + i) * H + u] = d_h;
      } else {
        gate += x_gate + h_gate;
      }
      m.gates[i * H + u] = gate;
    }
  cell_backward(
      s, cell_shape(H, 0, p.weights.norms), static_cast<float>(p.eps), p.dropout.key, row.at, m.gates, m.work,
      cell_states(row, H, p.c, p.c0, p.dc_last, p.dc0), norm_sums(dbias + 4 * H, H), sums,
      [&](int u) {
        const float given = p.dh ? widen<T>(p.dh, row.at * H + u) : 0.0f;
        return given + carried_or_last<T>(s, x, row, u, p.dh_last, H, u);
      },
      [&](int u, const float (&dgates)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t at = row.at * 4 * H + i * H + u;
          float dx = dgates[i], dh = dgates[i];
          dbias[i * H + u] += dgates[i];
          if (s.M) {
            dx *= scales[i * H + u], dh *= scales[(4 + i) * H + u];
            narrow<T>(p.dh_gates, at, dh);
            m.work[i * H + u] = dgates[i];
            x.dgates[static_cast<int64_t>(row.b) * 4 * H + i * H + u] = dgates[i];
          }
          narrow<T>(p.dx_gates, at, dx);
          x.gradients[(static_cast<int64_t>(i) * s.K + u) * s.pitch + row.b] = dh;
        }
      });
}

// dz [12Z] of a row, from dgates in m.work: warps share the places and quarters of the units, the lanes of a
// warp the numbers of an embedding and the units. Begins and ends with a barrier.
template <class T>
__device__ void embedding_row(const LstmBackward& p, const LstmPlan& s, const Row& row, const RowMemory& m) {
  const int H = s.H, Z = s.Z, quarter = (H + 3) / 4, lane = thread_number() % 32;
  int log2_lanes = 0;
  while (log2_lanes < 5 && 1 << log2_lanes < Z) ++log2_lanes;
  const int lanes = 1 << log2_lanes;
  __syncthreads();
  for (int item = thread_number() / 32; item < 4 * 12; item += kLstmWarps) {
    const int place = item % 12, i = place % 4, first = item / 12 * quarter;
    const int end = first + quarter < H ? first + quarter : H;
    const void* factors = place < 4 ? p.x_gates : p.h_gates;
    for (int z0 = 0; z0 < Z; z0 += lanes) {
      const int k = z0 + lane % lanes;
      float sum = 0;
#pragma unroll 4
      for (int u = first + lane / lanes; u < end; u += 32 / lanes) {
        float d = m.work[i * H + u];
        if (place < 8) d *= widen<T>(factors, row.at * 4 * H + i * H + u);
        if (k < Z)
          sum = multiply_add(d, widen<T>(p.weights.d_weight, (static_cast<int64_t>(place) * H + u) * Z + k),
                             sum);
      }
      for (int apart = lanes; apart < 32; apart *= 2) sum += __shfl_xor_sync(kAllLanes, sum, apart);
      if (lane < lanes && k < Z) m.dz_parts[(item / 12 * 12 + place) * Z + k] = sum;
    }
  }
  __syncthreads();
  for (int q = thread_number(); q < 12 * Z; q += kLstmThreads) {
    float sum = 0;
    for (int part = 0; part < 4; ++part) sum += m.dz_parts[part * 12 * Z + q];
    m.dz[q] = sum;
    narrow<T>(p.dz, row.at * 12 * Z + q, sum);
  }
  __syncthreads();
}

// The hyper LSTM's part of a row, from dz.
template <class T>
__device__ void hyper_row(const LstmBackward& p, const LstmPlan& s, const Exchange& x, const Row& row,
                          const RowMemory& m, BlockSums& sums) {
  const int H = s.H, M = s.M, quarter = 3 * s.Z;
  for (int e = thread_number(); e < 4 * M; e += kLstmThreads) {
    const int unit = e % M, first = e / M * quarter;
    float sum = 0;
#pragma unroll 4
    for (int q = first; q < first + quarter; ++q)
      sum = multiply_add(m.dz[q], widen<T>(p.weights.z_weight, static_cast<int64_t>(q) * M + unit), sum);
    m.dh_parts[e] = sum;
  }
  for (int e = thread_number(); e < 4 * M; e += kLstmThreads)
    m.gates[e] = widen<T>(p.hyper_gates, row.at * 4 * M + e);
  __syncthreads();
  float* total = x.sums + static_cast<int64_t>(blockIdx.x) * (14 * H + 10 * M) + 14 * H;
  cell_backward(
      s, cell_shape(M, 1, p.weights.hyper_norms), static_cast<float>(p.eps), p.dropout.key, row.at, m.gates,
      m.work, cell_states(row, M, p.hyper_c, p.hyper_c0, p.dhyper_c_last, p.dhyper_c0), norm_sums(total, M),
      sums,
      [&](int u) {
        float sum = carried_or_last<T>(s, x, row, H + u, p.dhyper_h_last, M, u);
        for (int part = 0; part < 4; ++part) sum += m.dh_parts[part * M + u];
        return sum;
      },
      [&](int u, const float (&dgates)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          narrow<T>(p.dhyper_gates, row.at * 4 * M + i * M + u, dgates[i]);
          x.gradients[(static_cast<int64_t>(i) * s.K + H + u) * s.pitch + row.b] = dgates[i];
        }
      });
}

// Adds a step's part of dd_weight of this block's units: over its rows, dd [12, units] of each times its z.
template <class T>
__device__ void add_d_weight(const LstmBackward& p, const LstmPlan& s, const Exchange& x, int64_t start,
                             int size, float* staged, float* totals) {
  const int H = s.H, Z = s.Z, units = s.units, row = 12 * units, first = blockIdx.x * units;
  for (int b0 = 0; b0 < size; b0 += kBatchTile) {
    const int rows = size - b0 < kBatchTile ? size - b0 : kBatchTile;
    for (int e = thread_number(); e < rows * row; e += kLstmThreads) {
      const int b = b0 + e / row, place = e % row / units, u = first + e % units;
      float d = 0;
      if (u < H) {
        const int at = place % 4 * H + u;
        d = x.dgates[static_cast<int64_t>(b) * 4 * H + at];
        if (place < 8) d *= widen<T>(place < 4 ? p.x_gates : p.h_gates, (start + b) * 4 * H + at);
      }
      staged[e] = d;
    }
    __syncthreads();
    for (int e = thread_number(); e < row * Z; e += kLstmThreads) {
      const int dd = e / Z, q = dd / units * Z + e % Z;
      float sum = totals[e];
#pragma unroll 8
      for (int b = 0; b < rows; ++b)
        sum = multiply_add(staged[b * row + dd], widen<T>(p.z, (start + b0 + b) * 12 * Z + q), sum);
      totals[e] = sum;
    }
    __syncthreads();
  }
}

// The matrix of the backward: see lstm.cuh.
template <class T>
__device__ T backward_weight(const LstmWeights& w, const LstmPlan& s, int gate, int k, int column) {
  const int H = s.H, M = s.M;
  const auto at = [&](const void* weight, int n, int i) {
    const int64_t row = k < H ? static_cast<int64_t>(gate) * H + k : static_cast<int64_t>(gate) * M + k - H;
    return static_cast<const T*>(weight)[row * n + i];
  };
  if (column < H) return at(k < H ? w.weight_hh : w.hyper_weight_xh, H, column);
  return k < H ? static_cast<T>(0.0f) : at(w.hyper_weight_hh, M, column - H);
}

// After the last step: the initial states' gradients, and what the blocks added up, in their order.
template <class T>
__device__ void finish(const LstmBackward& p, const LstmPlan& s, const Exchange& x, const float* d_weight) {
  const int H = s.H, M = s.M;
  for (int b = blockIdx.x; b < s.B; b += s.blocks)
    for (int k = thread_number(); k < s.K; k += kLstmThreads) {
      const float d = carried(s, x, b, k);
      if (k < H) narrow<T>(p.dh0, static_cast<int64_t>(b) * H + k, d);
      else narrow<T>(p.dhyper_h0, static_cast<int64_t>(b) * M + k - H, d);
    }
  const int count = 14 * H + 10 * M;
  const bool norms = p.weights.norms.gates_weight, hyper_norms = p.weights.hyper_norms.gates_weight;
  for (int e = blockIdx.x * kLstmThreads + thread_number(); e < count; e += s.blocks * kLstmThreads) {
    float sum = 0;
    for (int block = 0; block < s.row_blocks(); ++block)
      sum += x.sums[static_cast<int64_t>(block) * count + e];
    if (e < 4 * H) narrow<T>(p.dbias, e, sum);
    const bool of_main = e < 14 * H;
    const int n = of_main ? H : M, at = of_main ? e - 4 * H : e - 14 * H;
    if (at < 0 || !(of_main ? norms : hyper_norms)) continue;
    const int which = at < 8 * n ? at / (4 * n) : at / n - 6;
    const int begin = which < 2 ? which * 4 * n : (which + 6) * n;
    static_cast<float*>((of_main ? p.dnorms : p.dhyper_norms)[which])[at - begin] = sum;
  }
  const int first = blockIdx.x * s.units;
  for (int e = thread_number(); e < 12 * s.units * s.Z; e += kLstmThreads) {
    const int dd = e / s.Z, place = dd / s.units, u = first + dd % s.units;
    if (u < H) narrow<T>(p.dd_weight, (static_cast<int64_t>(place) * H + u) * s.Z + e % s.Z, d_weight[e]);
  }
}

template <int lane_columns, class T>
__global__ void __launch_bounds__(kLstmThreads, 1)
    lstm_bwd_kernel(const __grid_constant__ LstmBackward p, const __grid_constant__ LstmPlan s,
                    const __grid_constant__ Runs runs, const __grid_constant__ Exchange x) {
  T* weights = reinterpret_cast<T*>(dynamic_shared_memory());
  float* memory = reinterpret_cast<float*>(dynamic_shared_memory() + s.weight_bytes);
  float* d_weight = reinterpret_cast<float*>(dynamic_shared_memory() + s.weight_bytes + s.row_bytes);
  const RowMemory m(s, memory);
  BlockSums sums;
  load_strips<T>(s, weights, true, [&](int part, int k, int column) {
    return backward_weight<T>(p.weights, s, part, k, column);
  });
  for (int e = thread_number(); e < 12 * s.units * s.Z; e += kLstmThreads) d_weight[e] = 0;
  const int count = 14 * s.H + 10 * s.M;
  if (static_cast<int>(blockIdx.x) < s.row_blocks())
    for (int e = thread_number(); e < count; e += kLstmThreads)
      x.sums[static_cast<int64_t>(blockIdx.x) * count + e] = 0;
  __syncthreads();

  int64_t start = p.sizes.N;
  int size_after = 0;
  for (int t = static_cast<int>(p.sizes.T) - 1, run = runs.count - 1; t >= 0; --t) {
    if (run && t < runs.ends[run - 1]) --run;
    const int size = runs.sizes[run];
    start -= size;
    const int64_t start_before = start - runs.sizes[run && t == runs.ends[run - 1] ? run - 1 : run];
    for (int b = blockIdx.x; b < size; b += s.blocks) {
      const Row row{b, start + b, t ? start_before + b : -1, b >= size_after};
      if (s.M) {
        for (int q = thread_number(); q < 12 * s.Z; q += kLstmThreads)
          m.z[q] = widen<T>(p.z, row.at * 12 * s.Z + q);
        __syncthreads();
      }
      main_row<T>(p, s, x, row, m, sums);
      if (s.M) {
        embedding_row<T>(p, s, row, m);
        hyper_row<T>(p, s, x, row, m, sums);
      }
      __syncthreads();  // memory is free for the next row
    }
    for (int b = blockIdx.x; t && b < start - start_before; b += s.blocks) {
      prefetch_row<T>(p.x_gates, start_before + b, 4 * s.H);
      prefetch_row<T>(p.h_gates, start_before + b, 4 * s.H);
      if (p.dh) prefetch_row<T>(p.dh, start_before + b, s.H);
      if (s.M) prefetch_row<T>(p.hyper_gates, start_before + b, 4 * s.M);
    }
    grid_barrier();  // the step's gradients are there, and nobody reads the products any more
    if (s.M) add_d_weight<T>(p, s, x, start, size, memory, d_weight);
    multiply_strips<lane_columns>(s, weights, x.gradients, x.products, size, memory);
    grid_barrier();  // the products are there, and nobody reads the gradients any more
    size_after = size;
  }
  finish<T>(p, s, x, d_weight);
}

}  // namespace

const char* lstm_backward(const LstmBackward& call, DType dtype, uintptr_t stream) {
  return serve(call, dtype, true, [&](auto t, auto columns, const LstmPlan& s, const Runs& runs) {
    return launch_lstm(lstm_bwd_kernel<decltype(columns)::value, decltype(t)>, call, s, runs,
                       exchange_of(s, call.scratch), stream);
  });
}

}  // namespace hyperfast::cuda
