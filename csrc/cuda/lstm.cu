// lstm
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
  LstmPlan s;
  Runs runs;
  if (const char* refused = make_plan(s, runs, call.sizes, dtype, false)) return refused;
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 8) {
      return cudaErrorInvalidValue;
    } else {
      complete<T>(s, call.weights, call.dropout);
      return with_columns(s.lane_columns, [&](auto columns) {
        return launch_lstm(lstm_fwd_kernel<columns(), T>, call, s, runs, exchange_of(s, call.scratch),
                           stream);
      });
    }
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
