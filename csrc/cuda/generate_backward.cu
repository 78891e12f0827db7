// generate_backward: dz[k] = sum_n weight[n, k] dw[n] and |dw|^2, for all layers of a network in two launches.
//
// Idea. A stream over weight [N, K], as in generate.cu, summed along the other axis: lanes keep their columns and
// walk down the rows of their block in registers, the rows of a block add up by shuffles and in shared memory,
// and each block writes its K sums and its part of |dw|^2 to scratch. The second kernel adds the blocks of a
// layer. Every sum is added in an order that the sizes alone decide; the long ones, over blocks, in double.
//
// Bytes. N K + N elements (weight, dw). Model `full` in float32: 341 MB, no less than 102 us on an H100; partial
// sums are 8 (K + 1) bytes for 32,768 elements, under a thousandth. In flight: four 16-byte loads of each of 256
// threads, 16 KB a block, as much as an H100's SM needs (see generate.cu), with at least four blocks resident.
// The second kernel is one wave of short blocks: launch and latency, some 5 us by estimate.
//
// Why beside Triton's: it completes it, as generate.cu does. Which is faster awaits `python -m benchmarks.gpu`.

#include "rows.cuh"

namespace hyperfast::cuda {
namespace {

constexpr int kUnroll = 4;           // rows per thread in flight
constexpr int kColumns = 32;         // of partial sums, for a block of the second kernel
constexpr int kSumThreads = 1024;    // of that block: 32 walk down each column
constexpr int kElements = 32 << 10;  // of weight for a block of the first kernel

int rows_per_block(int K) {
  int rows = 32;
  while (2 * rows * K <= kElements) rows *= 2;
  return rows;
}
int64_t num_blocks(int64_t N, int K) { return ceil_div(N, rows_per_block(K)); }

struct BackwardEntry {
  GenerateBackwardSegment s;
  double* partials;  // [blocks, K + 1]
  int rows;          // of a block
  RowLayout layout;
};
using BackwardTable = Table<BackwardEntry, 60>;
static_assert(sizeof(BackwardTable) <= 4096, "the parameter space of a kernel");

template <class A>
struct BackwardShared {
  A sums[kWarps][32 * 8];  // 32 lanes of at most 8 columns
  double norms[kWarps];
};

// Sums of one block over its rows: columns k .. k + V - 1 of this thread, and |dw|^2 where it has the first ones.
template <int V, class T, class A = compute_t<T>>
__device__ void sum_rows(const BackwardEntry& entry, int64_t block, int k, A (&sum)[V], double& norm) {
  const int K = entry.s.K, log2_lanes = entry.layout.log2_lanes;
  const int rows_apart = kThreads >> log2_lanes;
  const int64_t first = block * entry.rows;
  const int64_t end = first + entry.rows < entry.s.N ? first + entry.rows : entry.s.N;
  const T* weight = static_cast<const T*>(entry.s.weight);
  const T* dw = static_cast<const T*>(entry.s.dw);
  for (int64_t n = first + (threadIdx.x >> log2_lanes); n < end; n += kUnroll * rows_apart) {
    Pack<T, V> w[kUnroll] = {};
    A g[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t row = n + u * rows_apart;
      g[u] = row < end ? static_cast<A>(dw[row]) : A(0);
      if (row < end && k < K) w[u] = load<V>(weight + row * K + k);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] = multiply_add(g[u], static_cast<A>(w[u].v[i]), sum[i]);
      if (k == 0) norm += static_cast<double>(g[u]) * static_cast<double>(g[u]);
    }
  }
}

template <int V, class T>
__device__ void backward_block(const BackwardEntry& entry, int64_t block) {
  using A = compute_t<T>;
  BackwardShared<A>& shared = shared_memory<BackwardShared<A>>();
  const int K = entry.s.K, lanes = 1 << entry.layout.log2_lanes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double* partial = entry.partials + block * (K + 1);
  for (int start = 0; start < K; start += lanes * V) {
    A sum[V] = {};
    double norm = 0;
    sum_rows<V, T>(entry, block, start + (lane & (lanes - 1)) * V, sum, norm);
    for (int d = 16; d >= lanes; d /= 2)
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], d);
    if (lane < lanes)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.sums[warp][lane * V + i] = sum[i];
    if (start == 0) {
      for (int d = 16; d > 0; d /= 2) norm += __shfl_xor_sync(kAllLanes, norm, d);
      if (lane == 0) shared.norms[warp] = norm;
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column < lanes * V && start + column < K) {
      A total = 0;
      for (int w = 0; w < kWarps; ++w) total += shared.sums[w][column];
      partial[start + column] = total;
    }
    if (start == 0 && threadIdx.x == 0) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += shared.norms[w];
      partial[K] = total;
    }
    __syncthreads();  // shared memory is free again
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    generate_backward_kernel(const __grid_constant__ BackwardTable table) {
  const int i = table.find(blockIdx.x);
  const BackwardEntry& entry = table.entries[i];
  const int block = blockIdx.x - table.first_block[i];
  if (entry.layout.vectors) backward_block<kVector<T>, T>(entry, block);
  else backward_block<1, T>(entry, block);
}

struct ColumnSums {
  double sums[kSumThreads / kColumns][kColumns];
};

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    generate_backward_sum_kernel(const __grid_constant__ BackwardTable table) {
  constexpr int kParts = kSumThreads / kColumns;
  ColumnSums& shared = shared_memory<ColumnSums>();
  const int i = table.find(blockIdx.x);
  const BackwardEntry& entry = table.entries[i];
  const int K = entry.s.K, x = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  const int column = (blockIdx.x - table.first_block[i]) * kColumns + x;
  const int64_t blocks = (entry.s.N + entry.rows - 1) / entry.rows;
  double sum = 0;
  if (column <= K)
#pragma unroll 8
    for (int64_t block = part; block < blocks; block += kParts) sum += entry.partials[block * (K + 1) + column];
  shared.sums[part][x] = sum;
  __syncthreads();
  if (part > 0 || column > K) return;
  for (int p = 1; p < kParts; ++p) sum += shared.sums[p][x];
  if (column < K) static_cast<T*>(entry.s.dz)[column] = static_cast<T>(static_cast<compute_t<T>>(sum));
  else *entry.s.squared_norm = sum;
}

// `rows` deals blocks out to rows, `columns` to columns of partial sums.
template <class T>
cudaError_t flush(BackwardTable& rows, BackwardTable& columns, cudaStream_t stream) {
  if (columns.count == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  if (rows.blocks() > 0) error = launch(generate_backward_kernel<T>, rows.blocks(), kThreads, 0, stream, rows);
  if (error == cudaSuccess)
    error = launch(generate_backward_sum_kernel<T>, columns.blocks(), kSumThreads, 0, stream, columns);
  rows.clear();
  columns.clear();
  return error;
}

}  // namespace

int64_t generate_backward_scratch(int64_t N, int K) { return num_blocks(N, K) * (K + 1); }

const char* generate_backward(const GenerateBackwardSegment* segments, size_t count, double* scratch,
                              DType dtype, uintptr_t stream) {
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    BackwardTable rows, columns;
    rows.clear();
    columns.clear();
    for (size_t i = 0; i < count; ++i) {
      const GenerateBackwardSegment& segment = segments[i];
      const int64_t blocks = num_blocks(segment.N, segment.K);
      if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
      if (!rows.takes(blocks))
        if (const cudaError_t error = flush<T>(rows, columns, s)) return error;
      const BackwardEntry entry{segment, scratch, rows_per_block(segment.K),
                                row_layout<T>(segment.weight, segment.K)};
      rows.add(entry, blocks);
      columns.add(entry, ceil_div(segment.K + 1, kColumns));
      scratch += generate_backward_scratch(segment.N, segment.K);
    }
    return flush<T>(rows, columns, s);
  });
}

}  // namespace hyperfast::cuda
