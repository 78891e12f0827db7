// Small kernels with and without one fault each, for the tests of the emulator itself.
#include <cstring>

#include "cuda/rows.cuh"

namespace hyperfast::cuda {
namespace {

constexpr int kCount = 256;

struct Buffer {
  float values[2 * kCount];
  Barrier arrived;
};

// out[i] = in[kCount - 1 - i], through shared memory
template <bool fault>
__global__ void missing_syncthreads(const float* in, float* out) {
  Buffer& shared = shared_memory<Buffer>();
  shared.values[threadIdx.x] = in[threadIdx.x];
  if (!fault) __syncthreads();
  out[threadIdx.x] = shared.values[kCount - 1 - threadIdx.x];
}

// The same, each warp for itself: its part of the input backwards.
template <bool fault>
__global__ void missing_syncwarp(const float* in, float* out) {
  Buffer& shared = shared_memory<Buffer>();
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  shared.values[threadIdx.x] = in[kCount - 32 - first + lane];
  if (!fault) __syncwarp();
  out[threadIdx.x] = shared.values[first + 31 - lane];
}

template <bool fault>
__global__ void missing_copy_wait(const float* in, float* out) {
  Buffer& shared = shared_memory<Buffer>();
  if (threadIdx.x < kCount / 4) copy_async(shared.values + 4 * threadIdx.x, in + 4 * threadIdx.x);
  commit_copies();
  if (fault) wait_copies<1>();
  else wait_copies<0>();
  __syncthreads();
  out[threadIdx.x] = shared.values[kCount - 1 - threadIdx.x];
}

enum Bulk { right, no_wait, no_last_wait, wrong_phase, odd_size, odd_address, no_second_barrier };

// Two halves of the input through one buffer.
template <Bulk fault>
__global__ void bulk_copies(const float* in, float* out) {
  Buffer& shared = shared_memory<Buffer>();
  if (threadIdx.x == 0) init_barrier(shared.arrived, 1);
  __syncthreads();
  for (int half = 0; half < 2; ++half) {
    const uint32_t bytes = kCount / 2 * sizeof(float) - (fault == odd_size ? 4 : 0);
    if (threadIdx.x == 0) {
      arrive_expecting(shared.arrived, bytes);
      copy_bulk(shared.values + (fault == odd_address), in + half * kCount / 2, bytes, shared.arrived);
    }
    const bool waits = fault != no_wait && !(fault == no_last_wait && half == 1);
    if (waits) wait_barrier(shared.arrived, fault == wrong_phase ? 0 : half);
    if (threadIdx.x < kCount / 2)
      out[kCount - 1 - half * kCount / 2 - threadIdx.x] = shared.values[threadIdx.x];
    if (fault != no_second_barrier) __syncthreads();
  }
}

template <bool fault>
__global__ void lanes_missing(const float* in, float* out) {
  float x = in[kCount - 1 - threadIdx.x];
  if (!fault || threadIdx.x % 32 < 16) x = __shfl_xor_sync(kAllLanes, __shfl_xor_sync(kAllLanes, x, 1), 1);
  out[threadIdx.x] = x;
}

template <bool fault>
__global__ void different_operations(const float* in, float* out) {
  const float x = in[kCount - 1 - threadIdx.x];
  if (fault && threadIdx.x % 2) __syncwarp();
  else __ballot_sync(kAllLanes, 1);
  out[threadIdx.x] = x;
}

template <bool fault>
__global__ void misaligned_access(const float* in, float* out) {
  if (fault) load<4>(in + 1);
  out[threadIdx.x] = in[kCount - 1 - threadIdx.x];
}

template <bool fault>
__global__ void out_of_bounds(const float* in, float* out) {
  out[threadIdx.x] = in[kCount - 1 - static_cast<int>(threadIdx.x) + (fault ? 1 : 0)];
}

template <bool fault>
__global__ void out_of_shared_bounds(const float* in, float* out) {
  float* values = reinterpret_cast<float*>(dynamic_shared_memory());
  values[threadIdx.x + (fault ? 1 : 0)] = in[kCount - 1 - threadIdx.x];
  out[threadIdx.x] = values[threadIdx.x];
}

// out = in backwards by way of out itself: each of the blocks writes its part of in, then reads the others'.
template <bool fault>
__global__ void missing_grid_barrier(const float* in, float* out) {
  const int count = kCount / gridDim.x, i = blockIdx.x * count + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < count) out[i] = in[i];
  if (!fault) grid_barrier();
  const float x = static_cast<int>(threadIdx.x) < count ? out[kCount - 1 - i] : 0;
  grid_barrier();
  if (static_cast<int>(threadIdx.x) < count) out[i] = x;
}

template <bool fault>
__global__ void early_exit(const float* in, float* out) {
  if (fault && threadIdx.x == 3 && blockIdx.x == 1) return;
  out[threadIdx.x] = in[kCount - 1 - threadIdx.x];
  grid_barrier();
}

template <bool fault>
__global__ void barrier_of_one_block(const float* in, float* out) {
  out[threadIdx.x] = in[kCount - 1 - threadIdx.x];
  if (!fault || blockIdx.x == 0) grid_barrier();
}

struct Named {
  const char* name;
  void (*kernels[2])(const float*, float*);  // right, with the fault
  int blocks = 1;                            // more: a cooperative launch
};
#define BOTH(name, ...) {#name, {name<false>, name<true>}, ##__VA_ARGS__}
constexpr Named kFaults[] = {
    BOTH(missing_syncthreads),
    BOTH(missing_syncwarp),
    BOTH(missing_copy_wait),
    BOTH(lanes_missing),
    BOTH(different_operations),
    BOTH(misaligned_access),
    BOTH(out_of_bounds),
    BOTH(out_of_shared_bounds),
    BOTH(missing_grid_barrier, 4),
    BOTH(early_exit, 4),
    BOTH(barrier_of_one_block, 4),
    {"no_wait", {bulk_copies<right>, bulk_copies<no_wait>}},
    {"no_last_wait", {bulk_copies<right>, bulk_copies<no_last_wait>}},
    {"wrong_phase", {bulk_copies<right>, bulk_copies<wrong_phase>}},
    {"odd_size", {bulk_copies<right>, bulk_copies<odd_size>}},
    {"odd_address", {bulk_copies<right>, bulk_copies<odd_address>}},
    {"no_second_barrier", {bulk_copies<right>, bulk_copies<no_second_barrier>}},
};

}  // namespace
}  // namespace hyperfast::cuda

// The launch's error, or null: out becomes in backwards where there is no fault.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(const char* name, int fault,
                                                                         int threads, const float* in,
                                                                         float* out) {
  using namespace hyperfast::cuda;
  for (const Named& known : kFaults)
    if (!std::strcmp(known.name, name)) {
      const size_t shared = kCount * sizeof(float);
      const cudaError_t error =
          known.blocks > 1
              ? launch_cooperative(known.kernels[fault], known.blocks, threads, shared, nullptr, in, out)
              : launch(known.kernels[fault], 1, threads, shared, nullptr, in, out);
      return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    }
  return "no such kernel";
}
