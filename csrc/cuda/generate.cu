// generate: w[n] = sum_k weight[n, k] z[k] + bias[n], for all layers of a network in one launch.
//
// Idea. The product has one multiply-add per weight read, so it is a stream over weight [N, K] and nothing
// else. A row is shared by a few lanes of a warp (4 at K = 16 in float32), each reading 16 bytes, so a warp
// reads 512 consecutive bytes; every thread keeps kRows such loads in flight, the first ones already before z
// arrives in shared memory, and a row's lanes add up by shuffles, always in the same order.
//
// Bytes. N K + 2 N elements (weight, bias, out); z is nothing. Model `full` (5,009,088 weights, K = 16) in
// float32: 361 MB, at the memory's nominal rate no less than 108 us on an H100 (3.35 TB/s) and 177 us on an
// A100 (2.04 TB/s). Plain loads suffice: 3 TB/s at a latency of 700 ns are 2.1 MB in flight, 16 KB for each of
// 132 SMs; one block has 256 x 4 x 16 bytes = 16 KB in flight, and at least four are resident.
// Where it loses: when K or the address of weight is no multiple of 16 bytes, rows are read element by element.
//
// Why beside Triton's: it completes it. Layers of any K share a launch, the table travels as kernel parameter
// (nothing is copied to the device, graphs capture it as it is), and it serves where Triton is missing. Which of
// them is faster awaits `python -m benchmarks.gpu`.

#include "rows.cuh"

namespace hyperfast::cuda {
namespace {

constexpr int kRows = 4;  // rows per thread, that is loads in flight

struct GenerateEntry {
  GenerateSegment s;
  RowLayout layout;
};
using GenerateTable = Table<GenerateEntry, 64>;
static_assert(sizeof(GenerateTable) <= 4096, "the parameter space of a kernel");

template <class A>
struct GenerateShared {
  A z[kMaxK];
};

// The rows of one block: row u of a thread is first + u * (kThreads / lanes).
template <int V, class T>
__device__ void generate_rows(const GenerateEntry& entry, int64_t block) {
  using A = compute_t<T>;
  A* z = shared_memory<GenerateShared<A>>().z;
  const int64_t N = entry.s.N;
  const int K = entry.s.K, log2_lanes = entry.layout.log2_lanes;
  const int lanes = 1 << log2_lanes, lane = threadIdx.x & (lanes - 1);
  const int rows_apart = kThreads >> log2_lanes;
  const int64_t first = block * kRows * rows_apart + (threadIdx.x >> log2_lanes);
  const T* weight = static_cast<const T*>(entry.s.weight) + first * K;
  const T* bias = static_cast<const T*>(entry.s.bias);

  Pack<T, V> w[kRows] = {};
  const auto load_rows = [&](int k) {
    if (k >= K) return;
#pragma unroll
    for (int u = 0; u < kRows; ++u)
      if (first + u * rows_apart < N) w[u] = load<V>(weight + u * rows_apart * K + k);
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
      for (int i = 0; i < V; ++i) sum[u] = multiply_add(static_cast<A>(w[u].v[i]), z[k + i], sum[u]);
    k += lanes * V;
    load_rows(k);
  }
  T* out = static_cast<T*>(entry.s.out);
#pragma unroll
  for (int u = 0; u < kRows; ++u) {
    sum[u] = sum_lanes(sum[u], log2_lanes);
    const int64_t n = first + u * rows_apart;
    if (lane == 0 && n < N) out[n] = static_cast<T>(sum[u]);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) generate_kernel(const __grid_constant__ GenerateTable table) {
  const int i = table.find(blockIdx.x);
  const GenerateEntry& entry = table.entries[i];
  const int block = blockIdx.x - table.first_block[i];
  if (entry.layout.vectors) generate_rows<kVector<T>, T>(entry, block);
  else generate_rows<1, T>(entry, block);
}

template <class T>
cudaError_t flush(GenerateTable& table, cudaStream_t stream) {
  if (table.count == 0) return cudaSuccess;
  const cudaError_t error = launch(generate_kernel<T>, table.blocks(), kThreads, 0, stream, table);
  table.clear();
  return error;
}

}  // namespace

const char* generate(const GenerateSegment* segments, size_t count, DType dtype, uintptr_t stream) {
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    GenerateTable table;
    table.clear();
    for (size_t i = 0; i < count; ++i) {
      const RowLayout layout = row_layout<T>(segments[i].weight, segments[i].K);
      const int64_t blocks = ceil_div(segments[i].N, kRows * (kThreads >> layout.log2_lanes));
      if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
      if (!table.takes(blocks))
        if (const cudaError_t error = flush<T>(table, s)) return error;
      table.add({segments[i], layout}, blocks);
    }
    return flush<T>(table, s);
  });
}

}  // namespace hyperfast::cuda
