// hyper_linear: y = x w^T + layer_bias with w = weight z + bias generated on chip, for up to 64 rows of x.
//
// Idea. For few rows a linear layer on generated weights is a stream over its generator [O I, K], which is K times
// what it makes: w never reaches memory. A block makes kOutputs outputs of all rows over a chunk of the inputs, a
// tile of kOutputs x tile_inputs weights at a time: the tile's part of the generator arrives in shared memory, the
// lanes of a warp multiply it with z and add up rows as in generate.cu, the weights go to shared memory, and every
// thread multiplies them with its rows of x (fused multiply-adds in float32, also for half precision, whose
// generated weights are not rounded on the way). Where the outputs alone are too few blocks for the machine, the
// inputs are cut into chunks, and a second kernel adds the parts of y in order: sums depend on the sizes alone.
//
// Bytes. O I (K + 1) elements; x is read once for each kOutputs outputs, from L2. 512 -> 1024, K = 16, float32:
// 35.7 MB, no less than 11 us on an H100. Arithmetic: O I (K + M) multiply-adds, 42 million at M = 64, 1.5 us.
//
// Copies. Between two barriers threads multiply and load nothing, so loads into registers would leave the memory
// idle, unless many blocks share an SM. So the generator comes by asynchronous copies, kStages tiles ahead: 48 KB in
// flight a block with two blocks on an SM, six times the 16 KB that 3 TB/s at a latency of 700 ns ask of each of
// 132 SMs (plain loads: 12 KB in registers, less what the barriers cost). On sm_90 these are bulk copies that
// complete on an mbarrier: a row of outputs each, 32 instructions a tile instead of 1024. On sm_80 cp.async, 16
// bytes each. Rows that are not aligned to 16 bytes are copied by the threads themselves, and lose.
//
// Why beside Triton's: Triton's merged kernel is an implicit GEMM on tensor cores, which are idle at these sizes,
// and has no float32 path that is exact and pipelined at once; this one is for evaluation with few rows in exact
// float32. It should win there; whether it does awaits `python -m benchmarks.gpu`, and if not it goes.

#include "rows.cuh"

namespace hyperfast::cuda {
namespace {

constexpr int kOutputs = 32;        // of a block: one for each lane
constexpr int kMaxInputs = 16;      // of a tile
constexpr int kStageBytes = 16384;  // of the generator, where one input of each output is no more
constexpr int kStages = 4;          // 2 where they are long
constexpr int kRingBytes = 131072;  // of all stages
constexpr int kBlocks = 264;        // wanted: two for each SM of an H100
constexpr int kRowsEach = 8;        // of x, for a thread
constexpr int kPitch = 33;          // of a row of weights in shared memory: no bank conflicts
constexpr int kPitchX = 68;         // of an input's rows of x, whole float4s

struct Shape {
  int M, O, I, K;
  int log2_inputs, chunk_inputs, chunks;  // inputs of a tile and of a chunk, whole tiles
  int stage_bytes, stages;                // stages: a power of two
  RowLayout layout;
};

constexpr int kAlignment = 128;  // of what lies in shared memory

template <class T>
Shape shape_of(int64_t M, int64_t O, int64_t I, int K, RowLayout layout) {
  const int64_t input_bytes = static_cast<int64_t>(kOutputs) * K * sizeof(T);
  int log2_inputs = 0;
  while (2 << log2_inputs <= kMaxInputs && input_bytes * (2 << log2_inputs) <= kStageBytes) ++log2_inputs;
  const int64_t stage_bytes = ceil_div(input_bytes << log2_inputs, kAlignment) * kAlignment;
  const int64_t strips = ceil_div(O, kOutputs), tiles = ceil_div(I, 1 << log2_inputs);
  const int64_t wanted = ceil_div(kBlocks, strips) < tiles ? ceil_div(kBlocks, strips) : tiles;
  const int64_t chunk = ceil_div(tiles, wanted) << log2_inputs;
  Shape s;
  s.M = static_cast<int>(M), s.O = static_cast<int>(O), s.I = static_cast<int>(I), s.K = K;
  s.log2_inputs = log2_inputs;
  s.chunk_inputs = static_cast<int>(chunk);
  s.chunks = static_cast<int>(ceil_div(I, chunk));
  s.stage_bytes = static_cast<int>(stage_bytes);
  s.stages = kStages * stage_bytes <= kRingBytes ? kStages : 2;
  s.layout = layout;
  return s;
}

struct alignas(16) Tile {  // everything but the generator, for two tiles: the next one is written while one is read
  float w[kMaxInputs * kPitch];
  float x[2][kMaxInputs * kPitchX];
  float bias[2][kMaxInputs * kOutputs];
  float z[kMaxK];
  Barrier arrived[kStages];
};

constexpr int kTileBytes = (sizeof(Tile) + kAlignment - 1) / kAlignment * kAlignment;

template <class T>
struct Block {
  const HyperLinear& p;
  const Shape& s;
  Tile& tile;
  unsigned char* ring;
  int o, first, end;  // its first output, its inputs

  __device__ __forceinline__ int width() const { return 1 << s.log2_inputs; }
  __device__ __forceinline__ int tiles() const { return (end - first + width() - 1) >> s.log2_inputs; }
  __device__ __forceinline__ int stage_of(int t) const { return t & (s.stages - 1); }
  __device__ __forceinline__ T* stage(int t) const {
    return reinterpret_cast<T*>(ring + stage_of(t) * s.stage_bytes);
  }
  // Of tile t, at most width().
  __device__ __forceinline__ int inputs(int t) const {
    const int left = end - first - (t << s.log2_inputs);
    return left < width() ? left : width();
  }
  // The generator of output r from input i on.
  __device__ __forceinline__ const T* generator(int r, int i) const {
    return static_cast<const T*>(p.weight) + (static_cast<int64_t>(o + r) * s.I + i) * s.K;
  }

  // Starts to copy tile t of the generator: row r, width() K elements, is one output's.
  __device__ void copy(int t) const {
    if (t >= tiles()) return;
    const int row = s.K << s.log2_inputs, length = inputs(t) * s.K, i = first + (t << s.log2_inputs);
    const int outputs = s.O - o < kOutputs ? s.O - o : kOutputs;
    T* to = stage(t);
    if (!s.layout.vectors) {
      for (int e = threadIdx.x; e < outputs * row; e += kThreads)
        if (e % row < length) to[e] = generator(e / row, i)[e % row];
      return;
    }
#if HYPERFAST_BULK_COPIES
    if (threadIdx.x >= 32) return;
    const uint32_t bytes = length * sizeof(T);
    if (threadIdx.x == 0) arrive_expecting(tile.arrived[stage_of(t)], bytes * outputs);
    __syncwarp();
    if (static_cast<int>(threadIdx.x) < outputs)
      copy_bulk(to + threadIdx.x * row, generator(threadIdx.x, i), bytes, tile.arrived[stage_of(t)]);
#else
    constexpr int V = kVector<T>;
    const int accesses = row / V;
    for (int e = threadIdx.x; e < outputs * accesses; e += kThreads) {
      const int r = e / accesses, k = e % accesses * V;
      if (k < length) copy_async(to + r * row + k, generator(r, i) + k);
    }
#endif
  }
  // To be called once for each tile copied, by all threads.
  __device__ __forceinline__ void commit() const {
#if !HYPERFAST_BULK_COPIES
    commit_copies();
#endif
  }
  // Returns when this thread may read what others have waited for too (a __syncthreads away) of tile t.
  __device__ __forceinline__ void wait(int t) const {
#if HYPERFAST_BULK_COPIES
    if (s.layout.vectors) wait_barrier(tile.arrived[stage_of(t)], t / s.stages & 1);
#else
    if (s.stages == kStages) wait_copies<kStages - 1>();
    else wait_copies<1>();
#endif
  }
};

// What of x and of the generator's bias a thread carries from memory to shared memory, a tile ahead.
template <class T>
struct Carried {
  static constexpr int kX = kMaxRows * kMaxInputs / kThreads, kBias = kOutputs * kMaxInputs / kThreads;
  float x[kX], bias[kBias];

  __device__ __forceinline__ void load(const Block<T>& b, int t) {
    const int inputs = t < b.tiles() ? b.inputs(t) : 0, log2 = b.s.log2_inputs;
    const int i = threadIdx.x & (b.width() - 1), row = threadIdx.x >> log2, rows = kThreads >> log2;
    const int input = b.first + (t << log2) + i;
#pragma unroll
    for (int u = 0; u < kX; ++u) {
      const int m = row + u * rows;
      x[u] = m < b.s.M && i < inputs
                 ? static_cast<float>(static_cast<const T*>(b.p.x)[static_cast<int64_t>(m) * b.s.I + input])
                 : 0.0f;
    }
    const T* from = static_cast<const T*>(b.p.bias);
#pragma unroll
    for (int u = 0; u < kBias; ++u) {
      const int r = row + u * rows;
      bias[u] = from && r < kOutputs && b.o + r < b.s.O && i < inputs
                    ? static_cast<float>(from[static_cast<int64_t>(b.o + r) * b.s.I + input])
                    : 0.0f;
    }
  }
  __device__ __forceinline__ void store(const Block<T>& b, int t) const {
    const int log2 = b.s.log2_inputs;
    const int i = threadIdx.x & (b.width() - 1), row = threadIdx.x >> log2, rows = kThreads >> log2;
#pragma unroll
    for (int u = 0; u < kX; ++u)
      if (row + u * rows < kMaxRows) b.tile.x[t % 2][i * kPitchX + row + u * rows] = x[u];
#pragma unroll
    for (int u = 0; u < kBias; ++u)
      if (row + u * rows < kOutputs) b.tile.bias[t % 2][i * kOutputs + row + u * rows] = bias[u];
  }
};

// w[i][r] of tile t: rows of the generator in shared memory times z.
template <int V, class T>
__device__ void generate_tile(const Block<T>& b, int t) {
  const int K = b.s.K, log2_lanes = b.s.layout.log2_lanes;
  const int lanes = 1 << log2_lanes, lane = threadIdx.x & (lanes - 1), apart = kThreads >> log2_lanes;
  const int inputs = b.inputs(t);
  const T* stage = b.stage(t);
  for (int n = threadIdx.x >> log2_lanes; n < kOutputs << b.s.log2_inputs; n += apart) {  // whole warps
    const int r = n >> b.s.log2_inputs, i = n & (b.width() - 1);
    const bool there = b.o + r < b.s.O && i < inputs;
    float sum = there && lane == 0 ? b.tile.bias[t % 2][i * kOutputs + r] : 0.0f;
    if (there)
      for (int k = lane * V; k < K; k += lanes * V) {
        const auto pack = *reinterpret_cast<const Pack<T, V>*>(stage + n * K + k);
#pragma unroll
        for (int e = 0; e < V; ++e)
          sum = multiply_add(static_cast<float>(pack.v[e]), b.tile.z[k + e], sum);
      }
    sum = sum_lanes(sum, log2_lanes);
    if (lane == 0) b.tile.w[i * kPitch + r] = sum;
  }
}

// Warps share the rows of x, kRowsEach for each; where there are fewer rows, also the inputs of a tile.
struct Share {
  int rows, part, parts;  // first row, part of the inputs
  __device__ explicit Share(int M) {
    int groups = kWarps;
    while (groups > 1 && (groups / 2) * kRowsEach >= M) groups /= 2;
    const int warp = threadIdx.x / 32;
    rows = warp % groups * kRowsEach;
    part = warp / groups;
    parts = kWarps / groups;
  }
};

template <class T>
__device__ void multiply_tile(const Block<T>& b, int t, const Share& share, float (&sum)[kRowsEach]) {
  for (int i = share.part; i < b.width(); i += share.parts) {
    const float w = b.tile.w[i * kPitch + threadIdx.x % 32];
    const float* x = b.tile.x[t % 2] + i * kPitchX + share.rows;
#pragma unroll
    for (int m = 0; m < kRowsEach; ++m) sum[m] = multiply_add(x[m], w, sum[m]);
  }
}

// Adds up the parts of the inputs, in order, and writes the block's y, or its part of it.
template <class T>
__device__ void write_rows(const Block<T>& b, const Share& share, const float (&sum)[kRowsEach], int chunk) {
  float* sums = b.tile.x[0];  // [parts, rows, outputs]
  const int x = threadIdx.x % 32, groups = kWarps / share.parts;
  __syncthreads();
#pragma unroll
  for (int m = 0; m < kRowsEach; ++m)
    sums[((share.part * groups * kRowsEach) + share.rows + m) * kOutputs + x] = sum[m];
  __syncthreads();
  for (int e = threadIdx.x; e < groups * kRowsEach * kOutputs; e += kThreads) {
    const int m = e / kOutputs, o = b.o + e % kOutputs;
    if (m >= b.s.M || o >= b.s.O) continue;
    float total = 0;
    for (int part = 0; part < share.parts; ++part) total += sums[part * groups * kRowsEach * kOutputs + e];
    const int64_t to = static_cast<int64_t>(m) * b.s.O + o;
    if (b.s.chunks > 1) {
      b.p.scratch[static_cast<int64_t>(chunk) * b.s.M * b.s.O + to] = total;
    } else {
      if (b.p.layer_bias) total += static_cast<float>(static_cast<const T*>(b.p.layer_bias)[o]);
      static_cast<T*>(b.p.y)[to] = static_cast<T>(total);
    }
  }
}
static_assert(sizeof(float) * kWarps * kRowsEach * kOutputs <= sizeof(Tile::x), "sums lie where x was");

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    hyper_linear_kernel(const __grid_constant__ HyperLinear p, const __grid_constant__ Shape s) {
  unsigned char* memory = dynamic_shared_memory();
  Tile& tile = *reinterpret_cast<Tile*>(memory);
  const int chunk = blockIdx.x % s.chunks, first = chunk * s.chunk_inputs;
  const Block<T> b{p,
                   s,
                   tile,
                   memory + kTileBytes,
                   static_cast<int>(blockIdx.x / s.chunks) * kOutputs,
                   first,
                   s.I - first < s.chunk_inputs ? s.I : first + s.chunk_inputs};
#if HYPERFAST_BULK_COPIES
  if (threadIdx.x == 0)
    for (int stage = 0; stage < s.stages; ++stage) init_barrier(tile.arrived[stage], 1);
#endif
  for (int k = threadIdx.x; k < s.K; k += kThreads) tile.z[k] = static_cast<float>(static_cast<const T*>(p.z)[k]);
  __syncthreads();
  Carried<T> carried;
  carried.load(b, 0);
  for (int t = 0; t < s.stages; ++t) {
    b.copy(t);
    b.commit();
  }
  const Share share(s.M);
  float sum[kRowsEach] = {};
  for (int t = 0; t < b.tiles(); ++t) {
    carried.store(b, t);
    carried.load(b, t + 1);
    b.wait(t);
    __syncthreads();  // the tile is there for all, and nobody reads w any more
    if (s.layout.vectors) generate_tile<kVector<T>>(b, t);
    else generate_tile<1>(b, t);
    __syncthreads();  // w is there, and nobody reads the stage any more
    b.copy(t + s.stages);
    b.commit();
    multiply_tile(b, t, share, sum);
  }
  write_rows(b, share, sum, chunk);
}

// y = layer_bias + the parts of all chunks, in order
template <class T>
__global__ void __launch_bounds__(kThreads) hyper_linear_sum_kernel(const __grid_constant__ HyperLinear p, int chunks) {
  const int64_t size = p.M * p.O, e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e >= size) return;
  float sum = p.layer_bias ? static_cast<float>(static_cast<const T*>(p.layer_bias)[e % p.O]) : 0.0f;
#pragma unroll 8
  for (int chunk = 0; chunk < chunks; ++chunk) sum += p.scratch[chunk * size + e];
  static_cast<T*>(p.y)[e] = static_cast<T>(sum);
}

template <class T>
cudaError_t launch_all(const HyperLinear& p, cudaStream_t stream) {
  const Shape s = shape_of<T>(p.M, p.O, p.I, p.K, row_layout<T>(p.weight, p.K));
  const int64_t blocks = ceil_div(s.O, kOutputs) * s.chunks;
  if (blocks > INT_MAX || p.M * p.O > static_cast<int64_t>(INT_MAX) * kThreads)
    return cudaErrorInvalidConfiguration;
  const size_t shared = kTileBytes + s.stages * s.stage_bytes;
  const cudaError_t error =
      launch(hyper_linear_kernel<T>, static_cast<int>(blocks), kThreads, shared, stream, p, s);
  if (error != cudaSuccess || s.chunks == 1) return error;
  return launch(hyper_linear_sum_kernel<T>, static_cast<int>(ceil_div(p.M * p.O, kThreads)), kThreads, 0, stream,
                p, s.chunks);
}

}  // namespace

int64_t hyper_linear_scratch(int64_t M, int64_t O, int64_t I, int K, DType dtype) {
  const Shape s = dtype == DType::f32 ? shape_of<float>(M, O, I, K, {}) : shape_of<__half>(M, O, I, K, {});
  return s.chunks > 1 ? s.chunks * M * O : 0;
}

const char* hyper_linear(const HyperLinear& call, DType dtype, uintptr_t stream) {
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 8) return cudaErrorInvalidValue;
    else return launch_all<T>(call, reinterpret_cast<cudaStream_t>(stream));
  });
}

}  // namespace hyperfast::cuda
