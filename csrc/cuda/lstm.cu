// lstm: one layer of an LSTM, layer-norm LSTM or HyperLSTM over a whole sequence in one launch, its recurrent
// matrices in the shared memory of the machine from the first step to the last.
//
// Idea. A step multiplies little: at the report's size (B 32, H 512, M 128, Z 16) 44 million multiply-adds
// with 5.8 MB of weights, 2 us of the machine, cut into products and passes that wait for each other. A
// launch for each costs more than its work. So all blocks stay (a cooperative launch, one block on a
// multiprocessor), and a step is two phases with a barrier of the grid after each:
//
//   products  every block multiplies the whole batch of [h, hyper_h] with its own columns of [weight_hh,
//             hyper_weight_xh, hyper_weight_hh], which never leave its shared memory (lstm.cuh);
//   rows      a block takes whole rows of the batch: hyper gates, norms, cell, embeddings z, modulation,
//             gates, norms, cell, h. Whatever runs along a row (the statistics of the norms, hyper_h -> z
//             -> d) stays in one block, so none of it needs a barrier of the grid: cut by units instead it
//             would take five.
//
// Order of memory. cooperative_groups' grid barrier: __syncthreads, then one thread's arrival as an atomic
// add with release at gpu scope, a loop of loads with acquire, __syncthreads. Release and acquire are
// cumulative, so what any thread of any block wrote before it is seen by any thread after it, in L1 too,
// which the acquire invalidates; the products read h by cp.async.cg, past L1, anyhow. Its counter is the
// driver's: there is none of ours to clear before a launch. Every thread reaches every barrier: the loops
// over steps and rows depend on sizes alone, and a block without rows (falling batch sizes) or without
// columns just has nothing between two of them. Sums are added in an order that the sizes fix; no atomics on
// data.
//
// CUDA graphs. Capture takes a cooperative launch as a kernel node with the attribute cooperative ("valid for
// graph nodes, launches", driver_types.h of CUDA 12 and 13; in graphs launched from the device not under
// MPS). Batch sizes, as runs of equal ones, are kernel parameters: a graph holds those it was captured with.
//
// Physics on an H100 (132 multiprocessors, 1.755 GHz, 128 FMA a clock each, L2 5.5 TB/s), float32, a step.
// All of it predicted, nothing measured. Layout: columns of a block x k in shared memory.
//
//   B 32, H 512, M 128, Z 16   107 blocks of 24 columns, 93 KiB
//     products  0.5 M FMA a block: 2.2 us at the peak, about 3.5; reads 8.8 MB of L2, 1.6 us beside it
//     rows      32 blocks, each reads d_weight (393 KB) and z_weight (98 KB) from L2 at 64 bytes a clock: 4.4
//               us; statistics, activations, latencies about 2
//     barriers  2, 1 to 2 us each: 3                                                          sum 13 us
//     launches  one product (4 to 6 us), hyper rows and main rows (the same reads: 6), 3 us of gaps in a CUDA
//               graph (the design in kernels/lstm.py)                                      13 to 15 us
//   B 128, H 1000, M 128, Z 4  128 blocks (113 with columns, 40 each), 218 KiB
//     products  25.7 us at the peak, about 36; L2 12 beside it; rows 5 + 3; barriers 3        sum 47 us
//     launches  cuBLAS in float32, 1.16 GFLOP: 25 to 30 us (TF32: 5); rows 8; gaps 3           36 to 41 us
//   B 32, H 512, no hyper LSTM 128 blocks of 16 columns, 65 KiB: products 2, rows 2, barriers 3  sum 7 us
//     launches  product 3 to 5, rows 2, gaps 2                                                  7 to 9 us
//
// Rule that follows, to be confirmed or dropped by a measurement: prefer this kernel for B <= 32, where one
// batch tile is all a block multiplies, H <= 512 and float32 without TF32; beyond, and wherever tensor cores
// may be used, products are worth a launch of their own. Until then it runs where HYPERFAST_ENGINE=cuda asks.
//
// Served on an H100: H up to about 1060 in float32 (M 128), 1440 in half precision, whose weights are half as
// large on chip while sums and the exchanged h stay float32. Half precision multiplies in float32.
#include "lstm.cuh"

namespace hyperfast::cuda {
namespace {

// Where the blocks meet in memory: in L2 for all that matters.
struct Exchange {
  float* state;     // [K, pitch]: h and hyper_h of the last step, k first
  float* products;  // [B, 4K]: gates by h (4H), hyper gates by h and hyper_h (4M)
};

Exchange exchange_of(const LstmPlan& s, float* scratch) {
  return {scratch, scratch + static_cast<int64_t>(s.K) * s.pitch};
}
int64_t exchange_floats(const LstmPlan& s) {
  return static_cast<int64_t>(s.K) * s.pitch + static_cast<int64_t>(s.B) * s.columns;
}

// c of a row and, through emit(unit, h), its h, from the gates [4n] before normalisation in shared memory,
// unit u's by thread u % kLstmThreads. Writes over gates. By all threads.
template <class F>
__device__ void cell_forward(const LstmPlan& s, const CellShape& cell, float eps, const int64_t* key,
                             int64_t row, float* gates, const float* c_before, float* c, BlockSums& sums,
                             F emit) {
  const int n = cell.n;
  float mean[4] = {}, inverse[4] = {1, 1, 1, 1};
  if (cell.gates_weight)
    statistics(sums, n, eps, mean, inverse, [&](int i, int u) { return gates[i * n + u]; });
  for (int u = thread_number(); u < n; u += kLstmThreads) {
    float a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = gates[i * n + u];
      if (cell.gates_weight)
        a[i] = multiply_add((a[i] - mean[i]) * inverse[i], cell.gates_weight[i * n + u],
                            cell.gates_bias[i * n + u]);
    }
    const float candidate = tanhf(a[2]) * dropout_scale(s, key, row, u, cell.stream);
    const float now = sigmoid(a[1]) * c_before[u] + sigmoid(a[0]) * candidate;
    c[u] = gates[u] = now;
    gates[n + u] = sigmoid(a[3]);
  }
  float cell_mean[1] = {}, cell_inverse[1] = {1};
  if (cell.cell_weight)
    statistics(sums, n, eps, cell_mean, cell_inverse, [&](int, int u) { return gates[u]; });
  for (int u = thread_number(); u < n; u += kLstmThreads) {
    float read = gates[u];
    if (cell.cell_weight)
      read = multiply_add((read - cell_mean[0]) * cell_inverse[0], cell.cell_weight[u], cell.cell_bias[u]);
    emit(u, gates[n + u] * tanhf(read));
  }
}

// z [12Z] of a row in shared memory: a warp for each number. Both barriers are here.
template <class T>
__device__ void embed(const LstmPlan& s, const LstmWeights& w, const float* hyper_h, float* z) {
  __syncthreads();
  const int lane = thread_number() % 32;
  for (int q = thread_number() / 32; q < 12 * s.Z; q += kLstmWarps) {
    const T* weight = static_cast<const T*>(w.z_weight) + static_cast<int64_t>(q) * s.M;
    float sum = 0;
    for (int m = lane; m < s.M; m += 32) sum = multiply_add(static_cast<float>(weight[m]), hyper_h[m], sum);
    sum = sum_lanes(sum, 5);
    if (lane == 0) z[q] = sum + widen<T>(w.z_bias, q);
  }
  __syncthreads();
}

// The rest of a step for row b, which is `row` of all and goes on from `before` (c0 where that is negative).
template <class T>
__device__ void forward_row(const Lstm& p, const LstmPlan& s, const Exchange& x, int b, int64_t row,
                            int64_t before, float* memory, BlockSums& sums) {
  const int H = s.H, M = s.M, larger = H > M ? H : M;
  const float eps = static_cast<float>(p.eps);
  float *gates = memory, *hyper_h = gates + 4 * larger, *z = hyper_h + M;
  const float* products = x.products + static_cast<int64_t>(b) * s.columns;
  const auto state_before = [&](const void* all, const void* first, int n) {
    return before < 0 ? static_cast<const float*>(first) + static_cast<int64_t>(b) * n
                      : static_cast<const float*>(all) + before * n;
  };
  if (M) {
    for (int m = thread_number(); m < M; m += kLstmThreads)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = row * 4 * M + i * M + m;
        gates[i * M + m] = products[4 * H + i * M + m] + widen<T>(p.hyper_x_gates, at);
        if (p.hyper_gates) narrow<T>(p.hyper_gates, at, gates[i * M + m]);
      }
    cell_forward(s, cell_shape(M, 1, p.weights.hyper_norms), eps, p.dropout.key, row, gates,
                 state_before(p.hyper_c, p.hyper_c0, M), static_cast<float*>(p.hyper_c) + row * M, sums,
                 [&](int m, float h) {
                   hyper_h[m] = narrow<T>(p.hyper_h, row * M + m, h);
                   x.state[static_cast<int64_t>(H + m) * s.pitch + b] = hyper_h[m];
                 });
    embed<T>(s, p.weights, hyper_h, z);
  }
  for (int u = thread_number(); u < H; u += kLstmThreads)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row * 4 * H + i * H + u;
      const float x_gate = widen<T>(p.x_gates, at);
      float h_gate = products[i * H + u];
      if (p.h_gates) narrow<T>(p.h_gates, at, h_gate);
      float gate = widen<T>(p.weights.bias, i * H + u);
      if (M) {
        const float* embedding = z + i * s.Z;
        const int64_t unit = static_cast<int64_t>(i) * H + u, place = static_cast<int64_t>(4) * H;
        gate += modulate<T>(s, p.weights.d_weight, unit + 2 * place, embedding + 8 * s.Z);
        gate = multiply_add(modulate<T>(s, p.weights.d_weight, unit, embedding), x_gate, gate);
        h_gate *= modulate<T>(s, p.weights.d_weight, unit + place, embedding + 4 * s.Z);
        gate += h_gate;
      } else {
        gate += x_gate + h_gate;
      }
      gates[i * H + u] = gate;
    }
  cell_forward(s, cell_shape(H, 0, p.weights.norms), eps, p.dropout.key, row, gates,
               state_before(p.c, p.c0, H), static_cast<float*>(p.c) + row * H, sums, [&](int u, float h) {
                 x.state[static_cast<int64_t>(u) * s.pitch + b] = narrow<T>(p.h, row * H + u, h);
               });
  __syncthreads();  // memory is free for the next row
}

// The matrix of the forward: see lstm.cuh.
template <class T>
__device__ T forward_weight(const LstmWeights& w, const LstmPlan& s, int k, int column) {
  const int H = s.H, M = s.M, hyper = column - 4 * H;
  const auto at = [](const void* weight, int row, int n, int i) {
    return static_cast<const T*>(weight)[static_cast<int64_t>(row) * n + i];
  };
  if (hyper < 0) return k < H ? at(w.weight_hh, column, H, k) : static_cast<T>(0.0f);
  return k < H ? at(w.hyper_weight_xh, hyper, H, k) : at(w.hyper_weight_hh, hyper, M, k - H);
}

template <int lane_columns, class T>
__global__ void __launch_bounds__(kLstmThreads, 1)
    lstm_fwd_kernel(const __grid_constant__ Lstm p, const __grid_constant__ LstmPlan s,
                    const __grid_constant__ Runs runs, const __grid_constant__ Exchange x) {
  T* weights = reinterpret_cast<T*>(dynamic_shared_memory());
  float* memory = reinterpret_cast<float*>(dynamic_shared_memory() + s.weight_bytes);
  BlockSums sums;
  load_strips<T>(s, weights, false,
                 [&](int, int k, int column) { return forward_weight<T>(p.weights, s, k, column); });
  for (int b = blockIdx.x; b < s.B; b += s.blocks)
    for (int k = thread_number(); k < s.K; k += kLstmThreads)
      x.state[static_cast<int64_t>(k) * s.pitch + b] =
          k < s.H ? widen<T>(p.h0, static_cast<int64_t>(b) * s.H + k)
                  : widen<T>(p.hyper_h0, static_cast<int64_t>(b) * s.M + k - s.H);
  int64_t start = 0, start_before = -1;
  for (int t = 0, run = 0; t < static_cast<int>(p.sizes.T); ++t) {
    if (t == runs.ends[run]) ++run;
    const int size = runs.sizes[run];
    for (int b = blockIdx.x; b < size; b += s.blocks) {
      prefetch_row<T>(p.x_gates, start + b, 4 * s.H);
      if (s.M) prefetch_row<T>(p.hyper_x_gates, start + b, 4 * s.M);
    }
    grid_barrier();  // h of the step before is there
    multiply_strips<lane_columns>(s, weights, x.state, x.products, size, memory);
    grid_barrier();  // all products are there, and nobody reads h any more
    for (int b = blockIdx.x; b < size; b += s.blocks)
      forward_row<T>(p, s, x, b, start + b, start_before < 0 ? -1 : start_before + b, memory, sums);
    start_before = start;
    start += size;
  }
}

}  // namespace

const char* lstm(const Lstm& call, DType dtype, uintptr_t stream) {
  return serve(call, dtype, false, [&](auto t, auto columns, const LstmPlan& s, const Runs& runs) {
    return launch_lstm(lstm_fwd_kernel<decltype(columns)::value, decltype(t)>, call, s, runs,
                       exchange_of(s, call.scratch), stream);
  });
}

int64_t lstm_scratch(const LstmSizes& sizes, DType dtype, bool backward) {
  LstmPlan s;
  Runs runs;
  if (make_plan(s, runs, sizes, dtype, backward)) return 0;
  return backward ? LstmBackwardFloats(s).all() : exchange_floats(s);
}

const char* lstm_refuses(const LstmSizes& sizes, DType dtype, bool backward) {
  LstmPlan s;
  Runs runs;
  return make_plan(s, runs, sizes, dtype, backward);
}

}  // namespace hyperfast::cuda
