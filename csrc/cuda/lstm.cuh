// What the two persistent kernels of an LSTM share: how its matrices lie on chip, the products with them, the
// sums over a row, the cell. The idea and its costs are told in lstm.cu.
//
// The matrices. Both kernels multiply a batch of K = H + M numbers a row, held k first so that a batch tile
// of one k is 128 contiguous bytes, with one matrix, of the forward [K, 4K], of the backward [4, K, K]:
//
//   forward   columns: 4H gates by h, 4M hyper gates by h and hyper_h
//             rows:    H of h:        weight_hh^T   hyper_weight_xh^T
//                      M of hyper_h:  0             hyper_weight_hh^T
//   backward  the transpose, cut into the four gates: part g has the H rows of dh_gates and the M rows of
//             dhyper_gates of gate g, so that a block reads as few numbers as in the forward; its columns are
//             dh and dhyper_h of the step before, and the row's block adds up the four parts.
//
// A strip is `width` columns of one part. Block i owns strips i, i + blocks, ... and keeps them in shared
// memory; a step's product is width columns at a time: the 16 warps share the rows k, each copies its own
// into a ring of its own and keeps 4 rows of the batch x lane_columns sums in the registers of a lane, and at
// the end the warps' sums are added in order. Not one barrier lies between, and sums depend on the sizes
// alone.
#pragma once

#include <cmath>
#include <type_traits>

#include "rows.cuh"

namespace hyperfast::cuda {
namespace {

constexpr int kLstmThreads = 512;
constexpr int kLstmWarps = kLstmThreads / 32;
constexpr int kBatchTile = 32;                      // rows of the batch in a product
constexpr int kWarpRows = 4;                        // rows k of a warp in a stage
constexpr int kChunkRows = kLstmWarps * kWarpRows;  // of all warps
constexpr int kRingStages = 4;                      // 32 KiB in flight
constexpr int kRingFloats = kRingStages * kChunkRows * kBatchTile;
constexpr int kMaxRuns = 256;

// Batch sizes fall: steps up to ends[i] have sizes[i] rows.
struct Runs {
  int count;
  int ends[kMaxRuns], sizes[kMaxRuns];
};

// How one of the kernels is laid out on a device.
struct LstmPlan {
  int H, M, Z, B;
  int K, columns, parts;                   // of a part: K rows, `columns` columns
  int lane_columns, passes;                // of a lane; strips of a block, at most
  int strips, blocks;                      // strips of a part
  int pitch;                               // of a k in the exchanged numbers: B, whole tiles
  int units;                               // of the main LSTM a block sums up dd_weight for (backward)
  int vectors;                             // 1: rows of d_weight are read in accesses of 16 bytes
  int weight_bytes, row_bytes, sum_bytes;  // shared memory: strips, what one row needs, dd_weight
  uint32_t threshold;                      // of dropout
  float keep_scale;

  __host__ __device__ int width() const { return 4 * lane_columns; }
  __host__ __device__ int row_blocks() const { return B < blocks ? B : blocks; }
  __host__ __device__ size_t shared() const { return size_t(weight_bytes) + row_bytes + sum_bytes; }
};

template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_shared(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}

template <class T>
__device__ __forceinline__ float widen(const void* p, int64_t i) {
  return static_cast<float>(static_cast<const T*>(p)[i]);
}

// Stores as T; what was stored.
template <class T>
__device__ __forceinline__ float narrow(void* p, int64_t i, float value) {
  const T stored = static_cast<T>(value);
  static_cast<T*>(p)[i] = stored;
  return static_cast<float>(stored);
}

// Sums over the block's threads, in the same order always. One barrier each: the next sum has other memory.
struct SumMemory {
  float sums[2][10][kLstmWarps];
};
struct BlockSums {
  int turn = 0;

  template <int n>
  __device__ __forceinline__ void operator()(float (&values)[n]) {
    static_assert(n <= 10);
    auto& sums = shared_memory<SumMemory>().sums[turn];
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] = sum_lanes(values[i], 5);
      if (thread_number() % 32 == 0) sums[i][thread_number() / 32] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i) {
      values[i] = 0;
      for (int warp = 0; warp < kLstmWarps; ++warp) values[i] += sums[i][warp];
    }
  }
};

// output[b, column] = sum_k input[k, b] weights[k, column] for `batch` rows. weights: a strip in shared
// memory [K, 4 lane_columns]; input [K, pitch]; output: rows of out_pitch, of which `columns` are this
// strip's. By all threads; `memory`: the ring and the sums, free before and after.
template <int lane_columns, class T>
__device__ void multiply_strip(const T* weights, const float* input, int K, int pitch, int batch,
                               float* output, int out_pitch, int columns, float* memory) {
  constexpr int kWidth = 4 * lane_columns, V = lane_columns % 4 == 0 ? 4 : 2;
  const int lane = thread_number() % 32, warp = thread_number() / 32, row = lane % 8 * 4;
  const int chunks = (K + kChunkRows - 1) / kChunkRows;
  float* ring = memory + warp * (kRingFloats / kLstmWarps);
  for (int b0 = 0; b0 < batch; b0 += kBatchTile) {
    const auto copy = [&](int chunk) {
      const int k = chunk * kChunkRows + warp * kWarpRows + lane / 8;
      if (k < K)
        copy_async(ring + chunk % kRingStages * (kWarpRows * kBatchTile) + lane * 4,
                   input + static_cast<int64_t>(k) * pitch + b0 + row);
      commit_copies();
    };
    float sum[4][lane_columns] = {};
    const auto multiply = [&](const float* x, const T* w) {
      const Pack<float, 4> values = load_shared<4>(x);
#pragma unroll
      for (int j = 0; j < lane_columns; j += V) {
        const Pack<T, V> pack = load_shared<V>(w + j);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const float weight = static_cast<float>(pack.v[e]);
#pragma unroll
          for (int b = 0; b < 4; ++b) sum[b][j + e] = multiply_add(values.v[b], weight, sum[b][j + e]);
        }
      }
    };
    for (int chunk = 0; chunk < kRingStages - 1; ++chunk) copy(chunk);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_copies<kRingStages - 2>();
      __syncwarp();  // the chunk is there for all lanes, and none reads the one before any more
      copy(chunk + kRingStages - 1);
      const int k = chunk * kChunkRows + warp * kWarpRows;
      const float* x = ring + chunk % kRingStages * (kWarpRows * kBatchTile) + row;
      const T* w = weights + k * kWidth + lane / 8 * lane_columns;
      if (k + kWarpRows <= K) {
#pragma unroll
        for (int i = 0; i < kWarpRows; ++i) multiply(x + i * kBatchTile, w + i * kWidth);
      } else {
#pragma unroll 1
        for (int i = 0; k + i < K; ++i) multiply(x + i * kBatchTile, w + i * kWidth);
      }
    }
    wait_copies<0>();
    __syncthreads();  // nobody reads a ring any more

    // warp's sum of a column and a row of the batch; both fours of rows and columns lie in different banks
    const auto place = [](int warp, int column, int b) {
      return (warp * kWidth + column) * kBatchTile + (b ^ column % 8 * 4);
    };
    for (int half = 1; half >= 0; --half) {
      if (warp / (kLstmWarps / 2) == half)
#pragma unroll
        for (int j = 0; j < lane_columns; ++j) {
          const int column = lane / 8 * lane_columns + j;
          float* own = memory + place(warp % (kLstmWarps / 2), column, row);
          auto& at = *reinterpret_cast<Pack<float, 4>*>(own);
#pragma unroll
          for (int b = 0; b < 4; ++b) at.v[b] = half ? sum[b][j] : sum[b][j] + at.v[b];
        }
      __syncthreads();
    }
    for (int e = thread_number(); e < kWidth * kBatchTile; e += kLstmThreads) {
      const int column = e % kWidth, b = e / kWidth;
      if (b0 + b >= batch || column >= columns) continue;
      float total = 0;
#pragma unroll
      for (int i = 0; i < kLstmWarps / 2; ++i) total += memory[place(i, column, b)];
      output[static_cast<int64_t>(b0 + b) * out_pitch + column] = total;
    }
    __syncthreads();
  }
}

// All strips of this block: output [parts, .., columns] from input [parts, K, pitch].
template <int lane_columns, class T>
__device__ void multiply_strips(const LstmPlan& s, const T* weights, const float* input, float* output,
                                int batch, float* memory) {
  constexpr int kWidth = 4 * lane_columns;
  for (int strip = blockIdx.x; strip < s.parts * s.strips; strip += s.blocks) {
    const int part = strip / s.strips, column = strip % s.strips * kWidth;
    multiply_strip<lane_columns>(weights, input + static_cast<int64_t>(part) * s.K * s.pitch, s.K, s.pitch,
                                 batch, output + static_cast<int64_t>(part) * s.B * s.columns + column,
                                 s.columns, s.columns - column < kWidth ? s.columns - column : kWidth,
                                 memory);
    weights += s.K * kWidth;
  }
}

// Brings this block's strips on chip; value(part, k, column) is the matrix. A __syncthreads must follow.
template <class T, class F>
__device__ void load_strips(const LstmPlan& s, T* weights, bool columns_first, F value) {
  const int width = s.width();
  for (int strip = blockIdx.x; strip < s.parts * s.strips; strip += s.blocks) {
    const int part = strip / s.strips, first = strip % s.strips * width;
    for (int e = thread_number(); e < s.K * width; e += kLstmThreads) {
      const int k = columns_first ? e / width : e % s.K, c = columns_first ? e % width : e / s.K;
      weights[k * width + c] = first + c < s.columns ? value(part, k, first + c) : static_cast<T>(0.0f);
    }
    weights += s.K * width;
  }
}

// d[z] of rows of d_weight times a row's embeddings.
template <class T>
__device__ __forceinline__ float modulate(const LstmPlan& s, const void* d_weight, int64_t row,
                                          const float* z) {
  const T* d = static_cast<const T*>(d_weight) + row * s.Z;
  float sum = 0;
  if (s.vectors) {
    constexpr int V = kVector<T>;
#pragma unroll 2
    for (int k = 0; k < s.Z; k += V) {
      const uint4 word = *reinterpret_cast<const uint4*>(d + k);
      Pack<T, V> pack;
      memcpy(&pack, &word, sizeof(pack));
#pragma unroll
      for (int e = 0; e < V; ++e) sum = multiply_add(static_cast<float>(pack.v[e]), z[k + e], sum);
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < s.Z; ++k) sum = multiply_add(static_cast<float>(d[k]), z[k], sum);
  }
  return sum;
}

// hyperfast.reference.dropout_scale
__device__ __forceinline__ float dropout_scale(const LstmPlan& s, const int64_t* key, int64_t row, int column,
                                               int stream) {
  if (!key) return 1.0f;
  uint32_t c0 = column, c1 = static_cast<uint32_t>(row), c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(*key), k1 = static_cast<uint32_t>(static_cast<uint64_t>(*key) >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0, b = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0 >= s.threshold ? s.keep_scale : 0.0f;
}

// Asks for a row of n numbers that the next step reads.
template <class T>
__device__ __forceinline__ void prefetch_row(const void* all, int64_t row, int n) {
  const char* begin = static_cast<const char*>(all) + row * n * sizeof(T);
  for (int byte = thread_number() * 128; byte < n * static_cast<int>(sizeof(T)); byte += kLstmThreads * 128)
    prefetch(begin + byte);
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A row's mean and 1 / sqrt(variance + eps) of each of `count` vectors of n numbers, x(i, u); x is read twice
// by the same thread, unit u by thread u % kLstmThreads.
template <int count, class F>
__device__ __forceinline__ void statistics(BlockSums& sums, int n, float eps, float (&mean)[count],
                                           float (&inverse)[count], F x) {
  for (int i = 0; i < count; ++i) mean[i] = inverse[i] = 0;
#pragma unroll 1
  for (int u = thread_number(); u < n; u += kLstmThreads)
#pragma unroll
    for (int i = 0; i < count; ++i) mean[i] += x(i, u);
  sums(mean);
#pragma unroll
  for (int i = 0; i < count; ++i) mean[i] /= static_cast<float>(n);
#pragma unroll 1
  for (int u = thread_number(); u < n; u += kLstmThreads)
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float centred = x(i, u) - mean[i];
      inverse[i] = multiply_add(centred, centred, inverse[i]);
    }
  sums(inverse);
#pragma unroll
  for (int i = 0; i < count; ++i) inverse[i] = 1.0f / sqrtf(inverse[i] / static_cast<float>(n) + eps);
}

// One of the two LSTMs, of n units.
struct CellShape {
  int n, stream;                           // of dropout
  const float *gates_weight, *gates_bias;  // [4n] or null
  const float *cell_weight, *cell_bias;    // [n]
};
inline __device__ CellShape cell_shape(int n, int stream, const LstmNorms& norms) {
  return {n,
          stream,
          static_cast<const float*>(norms.gates_weight),
          static_cast<const float*>(norms.gates_bias),
          static_cast<const float*>(norms.cell_weight),
          static_cast<const float*>(norms.cell_bias)};
}

// ---- host: layouts

inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Floats of shared memory that one row needs: lstm.cu, lstm_backward.cu.
inline int64_t row_floats(const LstmSizes& sizes, bool backward) {
  const int64_t larger = sizes.H > sizes.M ? sizes.H : sizes.M;
  return backward ? 9 * larger + 5 * sizes.M + 6 * 12 * sizes.Z : 4 * larger + sizes.M + 12 * sizes.Z;
}

// The layout with these columns a lane; whether it fits.
inline bool lay_out(LstmPlan& s, int lane_columns, bool backward, int64_t of_row, size_t element,
                    const Device& device) {
  s.K = s.H + s.M, s.columns = backward ? s.K : 4 * s.K, s.parts = backward ? 4 : 1;
  s.pitch = static_cast<int>(round_up(s.B, kBatchTile));
  s.lane_columns = lane_columns;
  s.strips = static_cast<int>(ceil_div(s.columns, s.width()));
  const int strips = s.parts * s.strips, wanted = strips > s.B ? strips : s.B;
  s.blocks = wanted < device.multiprocessors ? wanted : device.multiprocessors;
  s.passes = static_cast<int>(ceil_div(strips, s.blocks));
  s.units = backward && s.M ? static_cast<int>(ceil_div(s.H, s.blocks)) : 0;
  const int64_t of_strip = static_cast<int64_t>(s.K) * s.width() * element;
  int64_t floats = kRingFloats;
  for (const int64_t needed : {static_cast<int64_t>(kLstmWarps / 2 * s.width() * kBatchTile), of_row,
                               static_cast<int64_t>(kBatchTile) * 12 * s.units})
    if (needed > floats) floats = needed;
  const int64_t weight_bytes = round_up(s.passes * of_strip, 16), row_bytes = round_up(4 * floats, 16);
  const int64_t sum_bytes = round_up(int64_t(4) * 12 * s.units * s.Z, 16);
  const int64_t reserved = sizeof(SumMemory);
  if (weight_bytes + row_bytes + sum_bytes + reserved > static_cast<int64_t>(device.shared)) return false;
  s.weight_bytes = static_cast<int>(weight_bytes), s.row_bytes = static_cast<int>(row_bytes);
  s.sum_bytes = static_cast<int>(sum_bytes);
  return true;
}

// How the current device does it, by the fewest columns a block; null, or why it cannot.
inline const char* make_plan(LstmPlan& s, Runs& runs, const LstmSizes& sizes, DType dtype, bool backward) {
  if (dtype == DType::f64) return "float64 has no kernel: it serves float32, float16 and bfloat16";
  Device device;
  if (const cudaError_t error = current_device(device)) return cudaGetErrorString(error);
  if (!device.cooperative) return "the device has no cooperative launches";
  runs.count = 0;
  for (int64_t t = 0; t < sizes.T; ++t) {
    if (t == 0 || sizes.batch_sizes[t] != sizes.batch_sizes[t - 1]) {
      if (runs.count == kMaxRuns) return "batch_sizes has more than 256 different sizes";
      runs.sizes[runs.count++] = static_cast<int>(sizes.batch_sizes[t]);
    }
    runs.ends[runs.count - 1] = static_cast<int>(t + 1);
  }
  constexpr int64_t kLargest = 1 << 15;  // of a size: no int overflows, and shared memory ends far below
  bool fits = false;
  LstmPlan best = {};
  for (const int64_t size : {sizes.H, sizes.M, sizes.Z, sizes.B})
    if (size > kLargest) return "the weights do not fit into the shared memory of the device";
  for (const int lane_columns : {4, 6, 10}) {
    LstmPlan tried = {};
    tried.H = static_cast<int>(sizes.H), tried.M = static_cast<int>(sizes.M);
    tried.Z = static_cast<int>(sizes.Z), tried.B = static_cast<int>(sizes.B);
    const size_t element = dtype == DType::f32 ? 4 : 2;
    if (!lay_out(tried, lane_columns, backward, row_floats(sizes, backward), element, device)) continue;
    if (!fits || tried.passes * lane_columns < best.passes * best.lane_columns) best = tried;
    fits = true;
  }
  if (!fits) return "the weights do not fit into the shared memory of the device";
  s = best;
  return nullptr;
}

// Floats of what the blocks of the backward exchange: lstm_backward.cu.
struct LstmBackwardFloats {
  int64_t gradients, products, dgates, modulation, sums;

  explicit LstmBackwardFloats(const LstmPlan& s) {
    const int64_t H = s.H, M = s.M, rows = s.row_blocks();
    gradients = 4 * int64_t(s.K) * s.pitch, products = 4 * int64_t(s.B) * s.K;
    dgates = M ? s.B * 4 * H : 0, modulation = M ? rows * 8 * H : 0, sums = rows * (14 * H + 10 * M);
  }
  int64_t all() const { return gradients + products + dgates + modulation + sums; }
};

// The numbers of a plan that depend on the tensors.
template <class T>
void complete(LstmPlan& s, const LstmWeights& weights, const LstmDropout& dropout) {
  s.vectors = reinterpret_cast<uintptr_t>(weights.d_weight) % 16 == 0 && s.Z % kVector<T> == 0;
  s.threshold = static_cast<uint32_t>(dropout.share * 4294967296.0);
  s.keep_scale = static_cast<float>(1.0 / (1.0 - dropout.share));
}

// Launches a kernel with everything it takes, if the device runs its blocks at once.
template <class Call, class Exchange>
cudaError_t launch_lstm(void (*kernel)(Call, LstmPlan, Runs, Exchange), const Call& call, const LstmPlan& s,
                        const Runs& runs, const Exchange& exchange, uintptr_t stream) {
  int resident = 0;
  if (const cudaError_t error = resident_blocks(kernel, kLstmThreads, s.shared(), resident)) return error;
  if (resident < s.blocks) return cudaErrorCooperativeLaunchTooLarge;
  return launch_cooperative(kernel, s.blocks, kLstmThreads, s.shared(),
                            reinterpret_cast<cudaStream_t>(stream), call, s, runs, exchange);
}

// f(an integral constant) for the columns of a lane.
template <class F>
cudaError_t with_columns(int lane_columns, F f) {
  switch (lane_columns) {
    case 4:
      return f(std::integral_constant<int, 4>());
    case 6:
      return f(std::integral_constant<int, 6>());
    default:
      return f(std::integral_constant<int, 10>());
  }
}

// start(a number of the dtype, an integral constant, the lane's columns, plan, runs) for a call.
template <class Call, class Start>
const char* serve(const Call& call, DType dtype, bool backward, Start start) {
  LstmPlan s;
  Runs runs;
  if (const char* refused = make_plan(s, runs, call.sizes, dtype, backward)) return refused;
  return with_dtype(dtype, [&](auto t) {
    if constexpr (sizeof(t) == 8) {
      return cudaErrorInvalidValue;
    } else {
      complete<decltype(t)>(s, call.weights, call.dropout);
      return with_columns(s.lane_columns, [&](auto columns) { return start(t, columns, s, runs); });
    }
  });
}

}  // namespace
}  // namespace hyperfast::cuda
