// CUDA kernels on the CPU: g++ compiles the very .cu files of csrc/cuda with this header in the place of
// nvcc's part of csrc/cuda/launch.cuh, and `launch` runs them. It finds what a GPU would hide or do wrong
// silently.
//
// Every thread of a block is a fiber with a stack of its own. One runs until it waits (for the block, its
// warp, a copy), then another one is chosen: the lowest first (schedule 0), the highest first (1), or at
// random from the schedule's number; from 2 on blocks come in random order too. Threads of a warp do not run
// in step, as on GPUs since Volta, so a missing __syncwarp shows as well. Shared memory is allocated to the
// byte, filled with NaN bits for every block. Asynchronous copies arrive as late as the waits allow (even
// schedules) or at once (odd ones): late shows a missing wait, at once a buffer that is filled while others
// still read it. The blocks of a cooperative launch run at once, in the same orders, so that a missing grid
// barrier shows too.
//
// A fault ends the launch with an error whose text cudaGetErrorString gives: threads that wait for ever,
// lanes that meet in different operations, misaligned accesses and copies, copies never waited for. Accesses
// out of bounds show under -fsanitize=address. Not emulated: atomics, clusters, the memory model (a fiber's
// writes are seen at once), sizes of more than one dimension.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

namespace emulator {

struct Index {
  unsigned x;
};

// What a kernel sees of itself; set before a fiber goes on.
inline Index thread, block, block_size, grid_size;

void set_schedule(unsigned schedule);

// cooperative: all blocks run at once, one on each multiprocessor.
cudaError_t run(int blocks, int threads, size_t shared, bool cooperative,
                const std::function<void()>& kernel);

struct Device {
  int multiprocessors;
  size_t shared;  // bytes a block may have
};
Device device();
void set_multiprocessors(int count);
int resident_blocks(size_t shared);

// Ends the launch with an error; does not return.
[[noreturn]] void fault(const std::string& what);

void wait_for_block();
void wait_for_grid();
// Waits for the lanes of `mask`, which must come here with the same operation; what each of the 32 handed
// over.
const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value);

void* shared_memory(const void* key, size_t bytes);
unsigned char* dynamic_shared_memory();

void copy_async(void* shared, const void* global);
void commit_copies();
void wait_copies(int newest);
void init_barrier(uint64_t* barrier, int arrivals);
void arrive_expecting(uint64_t* barrier, uint32_t bytes);
void wait_barrier(uint64_t* barrier, uint32_t parity);
void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);

template <class T>
const T* aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T))
    fault("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  return p;
}

template <class T>
T lane_of(const uint64_t* values, unsigned lane) {
  T value;
  std::memcpy(&value, values + lane, sizeof(T));
  return value;
}

template <class T>
const uint64_t* exchange_values(const char* operation, unsigned mask, T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return exchange(operation, mask, bits);
}

}  // namespace emulator

// CUDA's own names.

#define threadIdx (::emulator::thread)
#define blockIdx (::emulator::block)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange("__syncwarp", mask, 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::lane_of<T>(emulator::exchange_values("__shfl_xor_sync", mask, value),
                              (threadIdx.x % 32) ^ lanes);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulator::lane_of<T>(emulator::exchange_values("__shfl_sync", mask, value), lane % 32);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* votes = emulator::exchange("__ballot_sync", mask, predicate != 0);
  unsigned found = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) found |= unsigned(votes[lane]) << lane;
  return found;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  const uint64_t* values = emulator::exchange("__reduce_max_sync", mask, value);
  unsigned largest = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && values[lane] > largest) largest = unsigned(values[lane]);
  return largest;
}

template <class T>
T __ldcs(const T* p) {
  return *emulator::aligned(p);
}
template <class T>
T __ldg(const T* p) {
  return *emulator::aligned(p);
}
template <class T>
void __stcs(T* p, T value) {
  *const_cast<T*>(emulator::aligned(p)) = value;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Those of csrc/cuda/launch.cuh.
namespace hyperfast::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, cudaStream_t,
                   const Arguments&... arguments) {
  return emulator::run(blocks, threads, shared, false, [&] { kernel(arguments...); });
}

template <class... Parameters>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), int blocks, int threads, size_t shared,
                               cudaStream_t, const Parameters&... arguments) {
  return emulator::run(blocks, threads, shared, true, [&] { kernel(arguments...); });
}

struct Device {
  int multiprocessors;
  size_t shared;
  bool cooperative;
};
inline cudaError_t current_device(Device& device) {
  device = {emulator::device().multiprocessors, emulator::device().shared, true};
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t resident_blocks(void (*)(Parameters...), int, size_t shared, int& blocks) {
  blocks = emulator::resident_blocks(shared);
  return cudaSuccess;
}
inline void grid_barrier() { emulator::wait_for_grid(); }
inline int thread_number() { return static_cast<int>(threadIdx.x); }
inline void prefetch(const void*) {}

template <class T>
T& shared_memory() {
  static char key;
  return *static_cast<T*>(emulator::shared_memory(&key, sizeof(T)));
}
inline unsigned char* dynamic_shared_memory() { return emulator::dynamic_shared_memory(); }

inline float fast_divide(float x, float y) { return x / y; }
inline float fast_sqrt(float x) { return std::sqrt(x); }

inline void copy_async(void* shared, const void* global) { emulator::copy_async(shared, global); }
inline void commit_copies() { emulator::commit_copies(); }
template <int newest>
void wait_copies() {
  emulator::wait_copies(newest);
}

using Barrier = uint64_t;
inline void init_barrier(Barrier& barrier, int arrivals) { emulator::init_barrier(&barrier, arrivals); }
inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  emulator::arrive_expecting(&barrier, bytes);
}
inline void wait_barrier(Barrier& barrier, uint32_t parity) { emulator::wait_barrier(&barrier, parity); }
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, Barrier& barrier) {
  emulator::copy_bulk(shared, global, bytes, &barrier);
}

}  // namespace hyperfast::cuda
