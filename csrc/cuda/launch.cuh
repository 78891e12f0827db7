// What kernels ask of the hardware, under names that the emulator of the tests gives too: launches, shared
// memory, asynchronous copies, approximate arithmetic. nvcc sees the code below, g++ sees
// tests/cuda_emulator/emulator.h, and nothing else in csrc/cuda depends on which.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#ifndef __CUDACC__
#include "emulator.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace hyperfast::cuda {

// Queues a kernel; shared: bytes of dynamic shared memory a block.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared)))
      return error;
  }
  // clang-format off: it takes the last bracket apart
  kernel<<<blocks, threads, shared, stream>>>(arguments...);
  // clang-format on
  return cudaGetLastError();
}

// What the current device has; shared: bytes a block may have.
struct Device {
  int multiprocessors;
  size_t shared;
  bool cooperative;  // launches
};
inline cudaError_t current_device(Device& device) {
  int number, shared, cooperative;
  cudaError_t error = cudaGetDevice(&number);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, number);
  };
  ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(cooperative, cudaDevAttrCooperativeLaunch);
  if (error == cudaSuccess) device.shared = shared, device.cooperative = cooperative;
  return error;
}

// How many blocks of a kernel the current device runs at once.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), int threads, size_t shared, int& blocks) {
  Device device;
  if (const cudaError_t error = current_device(device)) return error;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared)))
    return error;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
  blocks *= device.multiprocessors;
  return error;
}

// Queues a kernel whose blocks all run at once, so that grid_barrier may be called; an error if the device
// cannot hold them. Stream capture records it as a kernel node with the attribute `cooperative`.
template <class... Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), int blocks, int threads, size_t shared,
                               cudaStream_t stream, const Parameters&... arguments) {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, attribute, static_cast<int>(shared)))
    return error;
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  return cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), addresses, shared, stream);
}

// Waits for all threads of all blocks; what any of them wrote before is then seen by all.
__device__ __forceinline__ void grid_barrier() { cooperative_groups::this_grid().sync(); }

// threadIdx.x, of which the compiler knows nothing more: addresses made from it are not kept in registers
// over the iterations of a long outer loop.
__device__ __forceinline__ int thread_number() {
  int number = threadIdx.x;
  asm volatile("" : "+r"(number));
  return number;
}

// Asks for the line to come into L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// A block's T in shared memory, one for each T, uninitialised.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  __shared__ alignas(16) unsigned char memory[sizeof(T)];
  return *reinterpret_cast<T*>(memory);
}

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_memory[];
  return dynamic_memory;
}

// A few units in the last place off.
__device__ __forceinline__ float fast_divide(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ float fast_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// cp.async (sm_80): 16 bytes for the calling thread, both addresses multiples of 16. A thread's copies since
// its last commit are one group; wait_copies<n> returns when all but its n newest groups have arrived.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int newest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// An mbarrier in shared memory (sm_90): a phase ends when `arrivals` threads have arrived and the bytes they
// expected were copied.
using Barrier = uint64_t;

// By one thread; a __syncthreads must follow.
__device__ __forceinline__ void init_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
// Returns when the phase of this parity (0 for the first) has ended.
__device__ __forceinline__ void wait_barrier(Barrier& barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
}

// Bulk copy (sm_90) that counts towards the barrier's phase; addresses and bytes multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
}

}  // namespace hyperfast::cuda
#endif

// Whether this is compiled for a GPU with bulk copies; the emulator's tests say it on the command line.
#ifndef HYPERFAST_BULK_COPIES
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define HYPERFAST_BULK_COPIES 1
#else
#define HYPERFAST_BULK_COPIES 0
#endif
#endif
