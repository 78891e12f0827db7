// generate: w[n] = sum_k weight[n, k] z[k] + bias[n], for all layers of a network in one launch.
//
// Idea. The product has one multiply-add per weight read, so it is a stream over weight [N, K] and nothing
// else. A row is shared by `lanes` threads (K / 4 for float32: 4 threads at K = 16), each reading 16 bytes,
// so a warp reads 512 consecutive bytes; every thread keeps kRows such loads in flight, the first ones
// already before z arrives in shared memory, and a row's lanes add up by shuffles, always in the same order.
// The layers lie in a table that travels as kernel parameter; a block finds its layer in the table's prefix
// sums of blocks.
//
// Bytes. N K + 2 N elements (weight, bias, out); z is nothing. Model `full` (5,009,088 weights, K = 16) in
// float32: 361 MB, at the memory's nominal rate no less than 108 us on an H100 (3.35 TB/s) and 177 us on an
// A100 (2.04 TB/s). Where it loses: when K or the address of weight is no multiple of 16 bytes, rows are read
// element by element. Not timed yet; it stays only if it beats the Triton kernel of the same name.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstring>

#include "generate.h"

namespace hyperfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;  // rows per thread, that is loads in flight
constexpr int kMaxSegments = 64;

struct Entry {
  GenerateSegment s;
  int16_t log2_lanes;  // threads per row, 1 to 32
  int16_t vectors;     // 1: rows are read 16 bytes at a time
};

struct Table {
  Entry entries[kMaxSegments];
  int first_block[kMaxSegments + 1];  // entry i owns blocks first_block[i] .. first_block[i + 1] - 1
  int count;
};
static_assert(sizeof(Table) <= 4096, "the parameter space of a kernel");

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

// Reads V elements once and for all: evict-first, so that the next layer's input stays in L2 instead.
template <typename T, int V>
__device__ Pack<T, V> load(const T* p) {
  Pack<T, V> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(p));
    memcpy(&pack, &raw, 16);
  } else {
    pack.v[0] = __ldcs(p);
  }
  return pack;
}

// The rows of one block, z in shared memory: row u of a thread is first + u * (kThreads / lanes).
template <typename T, int V, typename A>
__device__ void generate_rows(const Entry& entry, int64_t block, A* z) {
  const int64_t N = entry.s.N;
  const int K = entry.s.K;
  const int lanes = 1 << entry.log2_lanes, lane = threadIdx.x & (lanes - 1);
  const int rows_apart = kThreads >> entry.log2_lanes;
  const int64_t first = block * kRows * rows_apart + (threadIdx.x >> entry.log2_lanes);
  const T* weight = static_cast<const T*>(entry.s.weight) + first * K;
  const T* bias = static_cast<const T*>(entry.s.bias);

  Pack<T, V> w[kRows] = {};
  const auto load_rows = [&](int k) {
    if (k >= K) return;
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      if (first + u * rows_apart < N) w[u] = load<T, V>(weight + u * rows_apart * K + k);
  };
  int k = lane * V;
  load_rows(k);
  A sum[kRows];
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    const int64_t n = first + u * rows_apart;
    sum[u] = bias && lane == 0 && n < N ? static_cast<A>(bias[n]) : A(0);
  }
  for (int i = threadIdx.x; i < K; i += kThreads) z[i] = static_cast<A>(static_cast<const T*>(entry.s.z)[i]);
  __syncthreads();

  while (k < K) {
#pragma unroll
    for (int u = 0; u < kRows; ++u)
#pragma unroll
      for (int i = 0; i < V; ++i) sum[u] += static_cast<A>(w[u].v[i]) * z[k + i];
    k += lanes * V;
    load_rows(k);
  }
  T* out = static_cast<T*>(entry.s.out);
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    for (int d = lanes / 2; d > 0; d /= 2) sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], d);
    const int64_t n = first + u * rows_apart;
    if (lane == 0 && n < N) out[n] = static_cast<T>(sum[u]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) generate_kernel(const __grid_constant__ Table table) {
  using A = typename Accumulator<T>::type;
  __shared__ alignas(16) A z[kMaxK];
  const int block = blockIdx.x;
  int low = 0, high = table.count;  // the entry is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (block >= table.first_block[middle] ? low : high) = middle;
  }
  const Entry& entry = table.entries[low];
  if (entry.vectors) generate_rows<T, 16 / sizeof(T)>(entry, block - table.first_block[low], z);
  else generate_rows<T, 1>(entry, block - table.first_block[low], z);
}

template <typename T>
cudaError_t flush(Table& table, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  generate_kernel<T><<<table.first_block[table.count], kThreads, 0, stream>>>(table);
  table.count = 0;
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const GenerateSegment* segments, size_t count, cudaStream_t stream) {
  Table table;
  table.count = 0;
  table.first_block[0] = 0;
  for (size_t i = 0; i < count; ++i) {
    const GenerateSegment& s = segments[i];
    constexpr int V = 16 / sizeof(T);
    const bool vectors = reinterpret_cast<uintptr_t>(s.weight) % 16 == 0 && s.K % V == 0;
    const int loads = vectors ? s.K / V : s.K;
    int16_t log2_lanes = 0;
    while (log2_lanes < 5 && (1 << log2_lanes) < loads) ++log2_lanes;
    const int64_t rows = kRows * (kThreads >> log2_lanes);
    const int64_t blocks = (s.N + rows - 1) / rows;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    if (table.count == kMaxSegments || table.first_block[table.count] + blocks > INT_MAX)
      if (const cudaError_t error = flush<T>(table, stream)) return error;
    table.entries[table.count] = {s, log2_lanes, vectors};
    table.first_block[table.count + 1] = table.first_block[table.count] + static_cast<int>(blocks);
    ++table.count;
  }
  return flush<T>(table, stream);
}

}  // namespace

const char* generate(const GenerateSegment* segments, size_t count, DType dtype, uintptr_t stream) {
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  cudaError_t error = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::f32:
      error = launch<float>(segments, count, s);
      break;
    case DType::f64:
      error = launch<double>(segments, count, s);
      break;
    case DType::f16:
      error = launch<__half>(segments, count, s);
      break;
    case DType::bf16:
      error = launch<__nv_bfloat16>(segments, count, s);
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hyperfast::cuda
