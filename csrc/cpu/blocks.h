// Walking the blocks of all segments with all threads; holding z on the stack.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "simd.h"

namespace hyperfast {
namespace {

// Calls body(segment, first row, end row, block) for every block; block counts over all segments. Blocks are
// handed to threads as they become free (shared machines are uneven), which changes no result: no two blocks
// write the same place.
template <class Segment, class Body>
inline void for_each_block(const Segment* segments, int64_t count, int threads, Body body) {
  int64_t total = 0;
  for (int64_t s = 0; s < count; ++s) total += num_blocks(segments[s].N, segments[s].K);
  constexpr int64_t chunk = 8;  // blocks taken at once: about 512 KiB of float32 weights
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (total > 1)
  for (int64_t first = 0; first < total; first += chunk) {
    int64_t s = 0, base = 0;
    for (int64_t block = first; block < total && block < first + chunk; ++block) {
      while (block - base >= num_blocks(segments[s].N, segments[s].K)) {
        base += num_blocks(segments[s].N, segments[s].K);
        ++s;
      }
      const int64_t rows = rows_per_block(segments[s].K), begin = (block - base) * rows;
      const int64_t end = begin + rows < segments[s].N ? begin + rows : segments[s].N;
      body(segments[s], begin, end, block);
    }
  }
}

// Asks for what lies `ahead` bytes behind p. The hardware prefetchers stop at every page; asking 2 KiB ahead
// gave 15-25 % on one core (distances of 1 and 4 KiB less), measured on a Xeon of model 207 with K = 16.
constexpr int64_t kAhead = 2048;
template <int write = 0>
inline void prefetch_ahead(const void* p, int64_t bytes, int64_t ahead = kAhead) {
  const char* first = static_cast<const char*>(p) + ahead;
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(first + b, write);
}

// z in the type computed with, padded with zeros to whole vectors.
template <class T>
struct PaddedZ {
  using C = compute_t<T>;
  alignas(64) C values[kMaxK + 16];
  PaddedZ(const void* z, int64_t K) {
    const T* from = static_cast<const T*>(z);
    for (int64_t k = 0; k < K; ++k) values[k] = widen(from[k]);
    for (int64_t k = K; k < K + 16; ++k) values[k] = 0;
  }
};

template <class F>
inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float());
    case DType::float64:
      return f(double());
    case DType::bfloat16:
      return f(bfloat16());
  }
}

}  // namespace
}  // namespace hyperfast
