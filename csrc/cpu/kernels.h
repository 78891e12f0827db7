// CPU kernels over plain pointers. Letters: N generated weights of a layer, K embedding size.
//
// One call covers all layers through a table of segments. Every segment is cut into blocks of rows whose size
// depends on K alone, so that sums over N are added in the same order whatever the number of threads.
#pragma once
#include <array>
#include <cstdint>

namespace hyperfast {

constexpr int64_t kMaxK = 512;  // z is held on the stack of each thread

enum class DType { float32, float64, bfloat16 };

// w[n] = sum_k weight[n, k] z[k] + bias[n]
struct GenerateSegment {
  const void* weight;  // [N, K]
  const void* bias;    // [N] or null
  const void* z;       // [K]
  void* w;             // [N]
  int64_t N, K;
};

// dz[k] = sum_n weight[n, k] dw[n],  squared_norm = sum_n dw[n]^2
struct GenerateBackwardSegment {
  const void* weight;    // [N, K]
  const void* dw;        // [N]
  void* dz;              // [K]
  double* squared_norm;  // scalar
  int64_t N, K;
};

// Update rules; coefficients in the order of the classes in hyperfast/reference.py.
//
// adam: decay, step_size, beta1, beta2, bias_correction2_sqrt, eps, l2. States m (exp_avg), v (exp_avg_sq).
//   g += l2 p;  p *= decay;  m += (g - m) (1 - beta1);  v = beta2 v + (1 - beta2) g^2;
//   p -= step_size m / (sqrt(v) / bias_correction2_sqrt + eps)
// sgd: lr, l2, keep, take, gradient, buffer. State b (momentum_buffer), or none.
//   g += l2 p;  b = keep b + take g;  p -= lr (gradient g + buffer b)
enum class Rule { adam, sgd };
constexpr int kMaxStates = 2;
using Coefficients = std::array<double, 7>;

// How states are stored: in the type of the weights, or (with float32 weights) as in state_storage.h.
enum class Storage { plain, bfloat16, eight_bit };

struct State {
  void* values;   // the shape of what is updated; null: no such state
  float* scales;  // eight_bit: one for every rows_per_scale(K) rows
};

// What a rule updates: weight [N, K], or bias [N]
struct Updated {
  void* values;
  State states[kMaxStates];
  Coefficients coefficients;
};

// The rule on weight with the gradient dw outer z, on bias with dw, then w[n] = sum_k weight[n, k] z_next[k]
// + bias[n].
struct UpdateGenerateSegment {
  Updated weight, bias;
  bool bias_is_trained;    // or only added
  const void* dw;          // [N]
  const void *z, *z_next;  // [K]; before and after the update of z
  void* w;                 // [N], the next weights
  int64_t N, K;
  uint32_t seed;  // of stochastic rounding
};

// Rows that share one scale of 8-bit states: at most 256 elements, or one row.
inline int64_t rows_per_scale(int64_t K) {
  int64_t rows = 32;
  while (rows > 1 && rows * K > 256) rows /= 2;
  return rows;
}

// Blocks of rows: at most 1024 rows, about 64 KiB of float32 weights; a multiple of rows_per_scale.
inline int64_t rows_per_block(int64_t K) {
  const int64_t rows = 16384 / K / 32 * 32;
  return rows < 32 ? 32 : rows > 1024 ? 1024 : rows;
}
inline int64_t num_blocks(int64_t N, int64_t K) { return (N + rows_per_block(K) - 1) / rows_per_block(K); }

struct Kernels {
  const char* isa;
  void (*generate)(const GenerateSegment*, int64_t count, DType, int threads);
  // scratch: sum over segments of num_blocks(N, K) * (K + 1) doubles
  void (*generate_backward)(const GenerateBackwardSegment*, int64_t count, DType, double* scratch,
                            int threads);
  // every dw is multiplied by grad_scale first (gradient clipping)
  void (*update_generate)(const UpdateGenerateSegment*, int64_t count, DType, Rule, Storage,
                          double grad_scale, int threads);
};

#define HYPERFAST_DECLARE_KERNELS(isa)                                                            \
  namespace isa {                                                                                 \
  void generate(const GenerateSegment*, int64_t, DType, int);                                     \
  void generate_backward(const GenerateBackwardSegment*, int64_t, DType, double*, int);           \
  void update_generate(const UpdateGenerateSegment*, int64_t, DType, Rule, Storage, double, int); \
  }
HYPERFAST_DECLARE_KERNELS(scalar)
#ifdef __x86_64__
HYPERFAST_DECLARE_KERNELS(avx2)
HYPERFAST_DECLARE_KERNELS(avx512)
#endif

// The kernels in use: chosen once by the processor, or by the environment variable HYPERFAST_ISA.
// Throws std::runtime_error if that names an instruction set the build or the processor does not have.
const Kernels& kernels();
// Names of the instruction sets that were built and that this processor has, the preferred one last.
int supported(const Kernels** out, int capacity);

}  // namespace hyperfast
