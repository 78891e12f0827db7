// What the kernels over rows of generators share: types, the table of layers, and how the threads of a warp
// divide a row and add up its product with z. That order is one for all of them, so next weights are bit for bit
// what `generate` makes.
#pragma once

#include <climits>
#include <cstring>

#include "kernels.h"
#include "launch.cuh"

namespace hyperfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type computed with.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of a 16-byte access

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T v[V];
};

template <size_t bytes>
struct Word;
template <>
struct Word<1> {
  using type = unsigned char;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Reads or writes V elements in one access, evict-first: a generator is larger than L2, which is better kept for
// what comes back.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load(const T* p) {
  using W = typename Word<sizeof(Pack<T, V>)>::type;
  const W word = __ldcs(reinterpret_cast<const W*>(p));
  Pack<T, V> pack;
  memcpy(&pack, &word, sizeof(pack));
  return pack;
}
template <int V, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& pack) {
  using W = typename Word<sizeof(pack)>::type;
  W word;
  memcpy(&word, &pack, sizeof(pack));
  __stcs(reinterpret_cast<W*>(p), word);
}

// A row of K elements is shared by 2^log2_lanes neighbouring lanes; lane s reads elements s V .. s V + V - 1, and
// so on 2^log2_lanes V further. V is kVector where every row begins at a multiple of 16 bytes, else 1.
struct RowLayout {
  int16_t log2_lanes;
  int16_t vectors;  // 1: V is kVector
};

template <class T>
RowLayout row_layout(const void* weight, int K) {
  const bool vectors = reinterpret_cast<uintptr_t>(weight) % 16 == 0 && K % kVector<T> == 0;
  const int accesses = vectors ? K / kVector<T> : K;
  int16_t log2_lanes = 0;
  while (log2_lanes < 5 && (1 << log2_lanes) < accesses) ++log2_lanes;
  return {log2_lanes, vectors};
}

// The sum of a row from those of its lanes, in all of them.
template <class A>
__device__ __forceinline__ A sum_lanes(A sum, int log2_lanes) {
  for (int d = (1 << log2_lanes) / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
  return sum;
}

// Layers travel as kernel parameters: no table in device memory, no copy, and a captured graph holds them. Block
// numbers are dealt out to the entries in order.
template <class Entry, int kCapacity>
struct Table {
  Entry entries[kCapacity];
  int first_block[kCapacity + 1];  // entry i owns blocks first_block[i] .. first_block[i + 1] - 1
  int count;

  void clear() { count = 0, first_block[0] = 0; }
  int blocks() const { return first_block[count]; }
  bool takes(int64_t blocks_more) const { return count < kCapacity && blocks() + blocks_more <= INT_MAX; }
  void add(const Entry& entry, int64_t blocks_more) {
    entries[count] = entry;
    first_block[count + 1] = blocks() + static_cast<int>(blocks_more);
    ++count;
  }
  // The entry that owns `block`.
  __device__ __forceinline__ int find(int block) const {
    int low = 0, high = count;  // it is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (block >= first_block[middle] ? low : high) = middle;
    }
    return low;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(a value of the type) for the dtype, which returns a cudaError_t; CUDA's words for it if it is one.
template <class F>
const char* with_dtype(DType dtype, F f) {
  cudaError_t error = cudaErrorInvalidValue;
  switch (dtype) {
    case DType::f32:
      error = f(float());
      break;
    case DType::f64:
      error = f(double());
      break;
    case DType::f16:
      error = f(__half());
      break;
    case DType::bf16:
      error = f(__nv_bfloat16());
      break;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace hyperfast::cuda
