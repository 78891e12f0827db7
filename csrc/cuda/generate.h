// Launcher of the CUDA kernel `generate` (generate.cu), free of CUDA and torch headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hyperfast::cuda {

enum class DType { f32, f64, f16, bf16 };

constexpr int kMaxK = 512;  // longest embedding

// One layer: out[n] = sum_k weight[n, k] z[k] + bias[n], n < N. Device pointers to contiguous data of one
// dtype.
struct GenerateSegment {
  const void* weight;  // [N, K]
  const void* bias;    // [N] or null
  const void* z;       // [K]
  void* out;           // [N]
  int64_t N;           // >= 1
  int K;               // 1 .. kMaxK
};

// Queues all segments on `stream` (a cudaStream_t) of the current device. Null, or CUDA's words for what
// failed.
const char* generate(const GenerateSegment* segments, size_t count, DType dtype, uintptr_t stream);

}  // namespace hyperfast::cuda
