// update_generate: an optimizer's step on weight [N, K] with the rank-one gradient dw outer z, on bias [N] with
// dw, and the next weights from the new z: every layer in one launch, the generator and its states read and
// written once, the gradient formed in registers.
//
// Idea. Elementwise streams, with the rows and sums of generate.cu, so that the next weights are bit for bit what
// it would make. A warp takes a unit: two 16-byte accesses' worth of weight per thread (16 rows at K = 16 in
// float32, 64 of their threads' four elements each in two steps) and the same of each state. With 8-bit states
// a unit is exactly a group of rows that share a scale, so its largest magnitude is one warp reduction and the
// values wait for it in registers; where a group is larger than two accesses (K > 128, or rows that are not
// aligned) it is read twice. A block begins with the biases of its rows, one thread each.
// All numbers of a step (coefficients, clip factor, seeds, skip) are read from device memory: a captured graph
// takes the new ones.
//
// Bytes, for each float32 weight: 8 and 8 for each float32 state, 4 for each bfloat16, 2 for each 8-bit one.
// Model `full`, AdamW, float32: 2.0 GB with biases, no less than 611 us on an H100; 8 bits 1.0 GB, 306 us.
// In flight: Adam's three streams are 96 bytes a thread and 24 KB a block; at most 80 registers a thread keep
// three blocks on an SM, four times the 16 KB that 3 TB/s at 700 ns ask of each (generate.cu). Bulk copies would add a
// trip through shared memory and gain nothing where arithmetic is short and registers suffice: plain loads.
//
// Why beside Triton's: it completes it: layers of any K in one launch, a table that travels as kernel parameter,
// no Triton needed. Which is faster awaits `python -m benchmarks.gpu`.

#include "state_storage.cuh"

namespace hyperfast::cuda {
namespace {

template <class T>
constexpr int kAccesses = sizeof(T) == 2 ? 1 : 2;  // of each stream, for a thread at a time
constexpr int kMaxBlockRows = 512;
constexpr int kBlockElements = 8192;  // of weight for a block, where its rows allow that

struct UpdateEntry {
  UpdateGenerateSegment s;
  RowLayout layout;
  int16_t steps;    // of a unit, 32 / lanes rows each
  int16_t repeats;  // units of a warp
  int16_t states_aligned;
  __host__ __device__ int unit_rows() const { return steps * (32 >> layout.log2_lanes); }
  __host__ __device__ int block_rows() const { return unit_rows() * kWarps * repeats; }
};
using UpdateTable = Table<UpdateEntry, 20>;
static_assert(sizeof(UpdateTable) + sizeof(UpdateGenerateNumbers) <= 4096, "the parameter space of a kernel");

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }

// The rules in the compute type A; csrc/cpu/kernels.h has the equations. exact: IEEE's square root and quotient,
// for states that are exact themselves.
template <class A, bool exact>
struct Adam {
  static constexpr int states = 2, coefficients = 7;
  A decay, step_size, one_minus_beta1, beta2, one_minus_beta2, inverse_correction2, eps, l2;
  __device__ void read(const double* c) {
    decay = static_cast<A>(c[0]);
    step_size = static_cast<A>(c[1]);
    one_minus_beta1 = static_cast<A>(1 - c[2]);
    beta2 = static_cast<A>(c[3]);
    one_minus_beta2 = static_cast<A>(1 - c[3]);
    inverse_correction2 = static_cast<A>(1 / c[4]);
    eps = static_cast<A>(c[5]);
    l2 = static_cast<A>(c[6]);
  }
  __device__ __forceinline__ void update(A& p, A& m, A& v, A g) const {
    g += l2 * p;
    m += (g - m) * one_minus_beta1;
    v = beta2 * v + one_minus_beta2 * g * g;
    if constexpr (exact) p = decay * p - step_size * m / (root(v) * inverse_correction2 + eps);
    else p = decay * p - fast_divide(step_size * m, fast_sqrt(v) * inverse_correction2 + eps);
  }
};

template <class A>
struct SGD {
  static constexpr int states = 0, coefficients = 6;
  A lr, l2, keep, take, gradient, buffer;
  __device__ void read(const double* c) {
    lr = static_cast<A>(c[0]);
    l2 = static_cast<A>(c[1]);
    keep = static_cast<A>(c[2]);
    take = static_cast<A>(c[3]);
    gradient = static_cast<A>(c[4]);
    buffer = static_cast<A>(c[5]);
  }
  __device__ __forceinline__ void update(A& p, A&, A&, A g) const { p -= lr * (g + l2 * p); }
};

template <class A>
struct Momentum : SGD<A> {
  static constexpr int states = 1;
  __device__ __forceinline__ void update(A& p, A& b, A&, A g) const {
    g += this->l2 * p;
    b = this->keep * b + this->take * g;
    p -= this->lr * (this->gradient * g + this->buffer * b);
  }
};

template <class R, class A>
struct UpdateShared {
  R rule, bias_rule;
  A z[kMaxK], z_next[kMaxK];
  A bias[kMaxBlockRows];
};

// V elements of state j from element i on, as they are computed with.
template <class Format, int V, class A>
__device__ __forceinline__ void read_state(const void* state, int64_t i, bool aligned, float scale, A (&x)[V]) {
  using Code = typename Format::Code;
  const Code* codes = static_cast<const Code*>(state) + i;
  Pack<Code, V> pack;
  if (aligned) {
    pack = load<V>(codes);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) pack.v[e] = codes[e];
  }
#pragma unroll
  for (int e = 0; e < V; ++e) x[e] = Format::decode(pack.v[e], scale);
}

template <class Format, int V, class A>
__device__ __forceinline__ void write_state(void* state, int64_t i, bool aligned, float inverse, uint32_t seed,
                                            uint32_t index, const A (&x)[V]) {
  using Code = typename Format::Code;
  Code* codes = static_cast<Code*>(state) + i;
  Pack<Code, V> pack;
#pragma unroll
  for (int e = 0; e < V; ++e) pack.v[e] = Format::encode(x[e], inverse, random_bits(seed, index + e));
  if (aligned) {
    store(codes, pack);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) codes[e] = pack.v[e];
  }
}

// One access of a thread: V elements of weight and of each state, those of row r of its block from column k on.
template <int V, class T>
struct Access {
  using A = compute_t<T>;
  int r, k;
  bool there;
  A g;
  Pack<T, V> p;
  A x[2][V];
};

// The accesses of a thread to its unit, one after another: steps over rows, and accesses along each.
struct Cursor {
  int step = 0, access = 0;
  __device__ __forceinline__ void next(int accesses) {
    if (++access == accesses) access = 0, ++step;
  }
};

template <class T, class R, Storage storage>
struct Update {
  using A = compute_t<T>;
  using First = typename FormatOf<T, storage, 0>::type;
  using Second = typename FormatOf<T, storage, 1>::type;
  static constexpr bool scaled = First::scaled && R::states > 0;

  const UpdateEntry& entry;
  UpdateShared<R, A>& shared;
  int64_t first;  // row of the block
  int rows;       // that it has
  A grad_scale;
  uint32_t seed;
  bool skip;

  // The biases of the block's rows into shared memory, updated where they are trained.
  __device__ void update_biases() const {
    const UpdateGenerateSegment& s = entry.s;
    const Updated& bias = s.bias;
    const bool trained = s.bias_is_trained && !skip;
    for (int r = threadIdx.x; r < entry.block_rows(); r += kThreads) {  // whole warps: 32 rows share a scale
      const int64_t n = first + r, group = n / 32;
      const bool there = r < rows && bias.values;
      T* value = static_cast<T*>(bias.values) + n;
      A p[1] = {there ? static_cast<A>(*value) : A(0)}, x[2][1] = {};
      if (trained && there) {
        if constexpr (R::states > 0)
          read_state<First, 1>(bias.states[0], n, true, scaled ? bias.scales[0][group] : 0, x[0]);
        if constexpr (R::states > 1)
          read_state<Second, 1>(bias.states[1], n, true, scaled ? bias.scales[1][group] : 0, x[1]);
        const A g = static_cast<A>(static_cast<const T*>(s.dw)[n]) * grad_scale;
        shared.bias_rule.update(p[0], x[0][0], x[1][0], g);
      }
      Scale scale[2] = {};
      if (scaled && trained) find_scales({magnitude(x[0][0]), magnitude(x[1][0])}, scale);
      if (trained && there) {
        *value = static_cast<T>(p[0]);
        p[0] = static_cast<A>(*value);
        const uint32_t index = static_cast<uint32_t>(s.N * s.K + n);
        if constexpr (R::states > 0)
          write_state<First, 1>(bias.states[0], n, true, scale[0].inverse, seed, index, x[0]);
        if constexpr (R::states > 1)
          write_state<Second, 1>(bias.states[1], n, true, scale[1].inverse, seed, index, x[1]);
        if (scaled && r % 32 == 0) write_scales(bias, group, scale);
      }
      shared.bias[r] = p[0];
    }
  }

  template <int V>
  __device__ __forceinline__ void read(Access<V, T>& a, const Cursor& at, bool there, int row,
                                       const float (&scale)[2]) const {
    const UpdateGenerateSegment& s = entry.s;
    const int log2_lanes = entry.layout.log2_lanes, lane = threadIdx.x % 32;
    a.r = row + at.step * (32 >> log2_lanes) + (lane >> log2_lanes);
    a.k = ((at.access << log2_lanes) + (lane & ((1 << log2_lanes) - 1))) * V;
    a.there = there && a.r < rows && a.k < s.K;
    if (!a.there) return;
    const int64_t i = first * s.K + (a.r * s.K + a.k);
    a.p = load<V>(static_cast<const T*>(s.weight.values) + i);
    if (skip) return;
    a.g = static_cast<A>((static_cast<const T*>(s.dw) + first)[a.r]);
    if constexpr (R::states > 0)
      read_state<First, V>(s.weight.states[0], i, entry.states_aligned, scale[0], a.x[0]);
    if constexpr (R::states > 1)
      read_state<Second, V>(s.weight.states[1], i, entry.states_aligned, scale[1], a.x[1]);
  }

  template <int V>
  __device__ __forceinline__ void update(Access<V, T>& a) const {
    if (!a.there || skip) return;
    const A g = a.g * grad_scale;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      A p = static_cast<A>(a.p.v[e]);
      shared.rule.update(p, a.x[0][e], a.x[1][e], g * shared.z[a.k + e]);
      a.p.v[e] = static_cast<T>(p);
    }
  }

  template <int V>
  __device__ __forceinline__ void write(const Access<V, T>& a, const Scale (&scale)[2]) const {
    if (!a.there || skip) return;
    const UpdateGenerateSegment& s = entry.s;
    const int64_t i = first * s.K + (a.r * s.K + a.k);
    store(static_cast<T*>(s.weight.values) + i, a.p);
    const uint32_t index = static_cast<uint32_t>(i);
    if constexpr (R::states > 0)
      write_state<First, V>(s.weight.states[0], i, entry.states_aligned, scale[0].inverse, seed, index, a.x[0]);
    if constexpr (R::states > 1)
      write_state<Second, V>(s.weight.states[1], i, entry.states_aligned, scale[1].inverse, seed, index, a.x[1]);
  }

  template <int V>
  __device__ __forceinline__ void find_largest(const Access<V, T>& a, uint32_t (&largest)[2]) const {
    if (!a.there) return;
#pragma unroll
    for (int e = 0; e < V; ++e)
#pragma unroll
      for (int j = 0; j < R::states; ++j) {
        const uint32_t bits = magnitude(static_cast<float>(a.x[j][e]));
        largest[j] = bits > largest[j] ? bits : largest[j];
      }
  }

  __device__ __forceinline__ void find_scales(const uint32_t (&largest)[2], Scale (&scale)[2]) const {
    if constexpr (scaled) {
      scale[0] = scale_of<First>(__reduce_max_sync(kAllLanes, largest[0]));
      if constexpr (R::states > 1) scale[1] = scale_of<Second>(__reduce_max_sync(kAllLanes, largest[1]));
    }
  }

  __device__ __forceinline__ void write_scales(const Updated& u, int64_t group, const Scale (&scale)[2]) const {
    if constexpr (scaled) {
      u.scales[0][group] = scale[0].scale;
      if constexpr (R::states > 1) u.scales[1][group] = scale[1].scale;
    }
  }

  // The part of w[r] that a thread adds up: its columns, and the bias where it leads its row.
  template <int V>
  __device__ __forceinline__ A multiply(const Access<V, T>& a, A sum) const {
    if (a.there)
#pragma unroll
      for (int e = 0; e < V; ++e)
        sum = multiply_add(static_cast<A>(a.p.v[e]), shared.z_next[a.k + e], sum);
    return sum;
  }

  // The unit whose first row is `row` of the block, by one warp.
  template <int V>
  __device__ void update_unit(int row) const {
    constexpr int H = kAccesses<T>;
    const UpdateGenerateSegment& s = entry.s;
    const int lane = threadIdx.x % 32, log2_lanes = entry.layout.log2_lanes;
    const bool leads = (lane & ((1 << log2_lanes) - 1)) == 0;
    const int accesses = (s.K + (V << log2_lanes) - 1) / (V << log2_lanes), all = entry.steps * accesses;
    const bool held = all <= H;  // scales are found from what registers hold
    const int64_t group = (first + row) / entry.unit_rows();
    float old_scale[2] = {};
    if constexpr (scaled)
      for (int j = 0; j < R::states; ++j) old_scale[j] = s.weight.scales[j][group];
    Scale scale[2] = {};
    for (int pass = scaled && !held && !skip ? 0 : 1; pass < 2; ++pass) {
      uint32_t largest[2] = {};
      Cursor at;
      A sum = 0;
      for (int c = 0; c < all; c += H) {
        Access<V, T> a[H];
        Cursor ahead = at;
#pragma unroll
        for (int h = 0; h < H; ++h) {
          read(a[h], ahead, c + h < all, row, old_scale);
          ahead.next(accesses);
        }
#pragma unroll
        for (int h = 0; h < H; ++h) {
          update(a[h]);
          if (scaled && !skip && (held || pass == 0)) find_largest(a[h], largest);
        }
        if (scaled && pass == 0) {
          at = ahead;
          continue;
        }
        if (scaled && held && !skip) find_scales(largest, scale);
#pragma unroll
        for (int h = 0; h < H; ++h) {
          if (c + h >= all) break;
          write(a[h], scale);
          if (at.access == 0) sum = leads ? shared.bias[a[h].r] : A(0);
          sum = multiply(a[h], sum);
          if (at.access == accesses - 1) {
            sum = sum_lanes(sum, log2_lanes);
            if (leads && a[h].r < rows) (static_cast<T*>(s.w) + first)[a[h].r] = static_cast<T>(sum);
          }
          at.next(accesses);
        }
      }
      if (scaled && pass == 0) find_scales(largest, scale);
    }
    if (scaled && lane == 0 && !skip) write_scales(s.weight, group, scale);
  }

  template <int V>
  __device__ void update_block() const {
    const int unit_rows = entry.unit_rows();
    for (int row = threadIdx.x / 32 * unit_rows; row < rows; row += kWarps * unit_rows) update_unit<V>(row);
  }
};

// Blocks that an SM must be able to hold, which bounds the registers.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 2 : sizeof(T) == 4 ? 3 : 4;

template <class T, class R, Storage storage>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    update_generate_kernel(const __grid_constant__ UpdateTable table,
                           const __grid_constant__ UpdateGenerateNumbers numbers) {
  using A = compute_t<T>;
  UpdateShared<R, A>& shared = shared_memory<UpdateShared<R, A>>();
  const int i = table.find(blockIdx.x);
  const UpdateEntry& entry = table.entries[i];
  const UpdateGenerateSegment& s = entry.s;
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.first_block[i]) * entry.block_rows();
  if (threadIdx.x == 0) shared.rule.read(numbers.coefficients + s.layer * R::coefficients);
  if (threadIdx.x == 32) shared.bias_rule.read(numbers.bias_coefficients + s.layer * R::coefficients);
  for (int k = threadIdx.x; k < s.K; k += kThreads) {
    shared.z[k] = static_cast<A>(static_cast<const T*>(s.z)[k]);
    shared.z_next[k] = static_cast<A>(static_cast<const T*>(s.z_next)[k]);
  }
  const int block_rows = entry.block_rows();
  const int rows = s.N - first < block_rows ? static_cast<int>(s.N - first) : block_rows;
  const Update<T, R, storage> update{entry, shared, first, rows, static_cast<A>(*numbers.grad_scale),
                                     static_cast<uint32_t>(numbers.seeds[s.layer]),
                                     numbers.skip && *numbers.skip != 0};
  __syncthreads();
  update.update_biases();
  __syncthreads();
  if (entry.layout.vectors) update.template update_block<kVector<T>>();
  else update.template update_block<1>();
}

bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T, class R, Storage storage>
UpdateEntry entry_of(const UpdateGenerateSegment& s) {
  UpdateEntry entry{s, row_layout<T>(s.weight.values, s.K), 1, 1, 1};
  const int rows = 32 >> entry.layout.log2_lanes, V = entry.layout.vectors ? kVector<T> : 1;
  if (storage == Storage::eight_bit) entry.steps = rows_per_scale(s.K) / rows;
  else if (V << entry.layout.log2_lanes >= s.K) entry.steps = kAccesses<T>;
  while (entry.block_rows() % 32 || (2 * entry.block_rows() <= kMaxBlockRows &&
                                     2 * entry.block_rows() * s.K <= kBlockElements))
    entry.repeats *= 2;
  using First = typename FormatOf<T, storage, 0>::type;
  for (const void* state : s.weight.states)
    entry.states_aligned &= is_aligned(state, V * sizeof(typename First::Code));
  return entry;
}

template <class T, class R, Storage storage>
cudaError_t launch_all(const UpdateGenerateSegment* segments, size_t count,
                       const UpdateGenerateNumbers& numbers, cudaStream_t stream) {
  UpdateTable table;
  table.clear();
  const auto flush = [&]() -> cudaError_t {
    if (table.count == 0) return cudaSuccess;
    const auto kernel = update_generate_kernel<T, R, storage>;
    const cudaError_t error = launch(kernel, table.blocks(), kThreads, 0, stream, table, numbers);
    table.clear();
    return error;
  };
  for (size_t i = 0; i < count; ++i) {
    const UpdateEntry entry = entry_of<T, R, storage>(segments[i]);
    const int64_t blocks = ceil_div(segments[i].N, entry.block_rows());
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    if (!table.takes(blocks))
      if (const cudaError_t error = flush()) return error;
    table.add(entry, blocks);
  }
  return flush();
}

}  // namespace

const char* update_generate(const UpdateGenerateSegment* segments, size_t count,
                            const UpdateGenerateNumbers& numbers, Rule rule, bool with_states,
                            Storage storage, DType dtype, uintptr_t stream) {
  const cudaStream_t s = reinterpret_cast<cudaStream_t>(stream);
  return with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using A = compute_t<T>;
    constexpr Storage plain = Storage::plain, bfloat16 = Storage::bfloat16, eight_bit = Storage::eight_bit;
    const auto run = [&](auto launcher) { return launcher(segments, count, numbers, s); };
    if (storage == plain) {
      if (rule == Rule::adam) return run(launch_all<T, Adam<A, true>, plain>);
      return with_states ? run(launch_all<T, Momentum<A>, plain>) : run(launch_all<T, SGD<A>, plain>);
    }
    if constexpr (std::is_same_v<T, float>) {
      const bool adam = rule == Rule::adam;
      if (storage == bfloat16 && adam) return run(launch_all<T, Adam<A, false>, bfloat16>);
      if (storage == bfloat16) return run(launch_all<T, Momentum<A>, bfloat16>);
      return adam ? run(launch_all<T, Adam<A, false>, eight_bit>) : run(launch_all<T, Momentum<A>, eight_bit>);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace hyperfast::cuda
