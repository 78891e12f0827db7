// CPU kernels over plain pointers. Letters: N generated weights of a layer, K embedding size.
//
// One call covers all layers through a table of segments. Every segment is cut into blocks of rows whose size
// depends on K alone, so that sums over N are added in the same order whatever the number of threads.
#pragma once
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

// One AdamW update is  p *= decay;  m += (g - m) (1 - beta1);  v = beta2 v + (1 - beta2) g^2;
// p -= step_size m / (sqrt(v) / sqrt(1 - beta2^t) + eps)   with decay = 1 - lr weight_decay, step_size = lr /
// (1 - beta1^t).
struct AdamWCoefficients {
  double decay, step_size, beta1, beta2, bias_correction2_sqrt, eps;
};

// AdamW on weight with the gradient dw outer z, on bias with dw, then w[n] = sum_k weight[n, k] z_next[k] +
// bias[n].
struct AdamWGenerateSegment {
  void *weight, *exp_avg, *exp_avg_sq;  // [N, K]
  void *bias, *bias_exp_avg,
      *bias_exp_avg_sq;    // [N]; all null: no bias. Null moments: a bias that is not trained
  const void* dw;          // [N]
  const void *z, *z_next;  // [K]; before and after the update of z
  void* w;                 // [N], the next weights
  int64_t N, K;
  AdamWCoefficients weight_adamw, bias_adamw;
};

// Batch norm, ReLU and P x P max pool of channels_last images. Letters: B batch, H x W image, C channels, P
// side and stride of a window. Rows and columns that fill no window count in the statistics alone.
struct PooledImages {
  int64_t B, H, W, C, P;  // P is 1 (no pooling) or 2
  int64_t window_rows() const { return B * (H / P); }
  int64_t pixels() const { return B * H * W; }
  // Sums over the batch are taken tile by tile: whole pixels or rows of windows, about 32,768 elements.
  int64_t tile_pixels() const { return C < 512 ? 32768 / C / 64 * 64 : 64; }
  int64_t tile_window_rows() const { return P * W * C < 32768 ? 32768 / (P * W * C) : 1; }
  int64_t tiles() const { return (pixels() + tile_pixels() - 1) / tile_pixels(); }
  int64_t window_tiles() const { return (window_rows() + tile_window_rows() - 1) / tile_window_rows(); }
  // Doubles: two sums for each tile and channel, coefficients of each channel.
  int64_t scratch() const { return C * (2 * (tiles() > window_tiles() ? tiles() : window_tiles()) + 4); }
};

// y = max over the window of max(0, (x - mean) / sqrt(var + eps) weight + bias)
struct BatchNormSegment {
  PooledImages images;
  const void* x;              // [B, H, W, C]
  const void *weight, *bias;  // [C], float where x is bfloat16; null: 1 and 0
  double *mean, *var;         // [C], biased; written, or given where batch is null
  void* batch;                // [2, C] like weight: mean and unbiased variance, for running averages
  double eps;
  void* y;         // [B, H / P, W / P, C]
  uint8_t* index;  // like y: the winner's place in its window, row by row, P * P where ReLU is off; or null
};

struct BatchNormBackwardSegment {
  PooledImages images;
  const void* x;         // [B, H, W, C]
  const void* dy;        // [B, H / P, W / P, C]
  const uint8_t* index;  // like dy
  const void* weight;    // [C], float where x is bfloat16; null: 1
  const double *mean, *var;
  bool given;  // mean and var do not depend on x
  double eps;
  void* dx;               // like x, or null
  void *dweight, *dbias;  // like weight
};

// Blocks of rows: at most 1024 rows, about 64 KiB of float32 weights.
inline int64_t rows_per_block(int64_t K) {
  const int64_t rows = 16384 / K;
  return rows < 1 ? 1 : rows > 1024 ? 1024 : rows;
}
inline int64_t num_blocks(int64_t N, int64_t K) { return (N + rows_per_block(K) - 1) / rows_per_block(K); }

struct Kernels {
  const char* isa;
  void (*generate)(const GenerateSegment*, int64_t count, DType, int threads);
  // scratch: sum over segments of num_blocks(N, K) * (K + 1) doubles
  void (*generate_backward)(const GenerateBackwardSegment*, int64_t count, DType, double* scratch,
                            int threads);
  // every dw is multiplied by grad_scale first (gradient clipping)
  void (*adamw_generate)(const AdamWGenerateSegment*, int64_t count, DType, double grad_scale, int threads);
  // scratch: images.scratch() doubles
  void (*batch_norm)(const BatchNormSegment&, DType, double* scratch, int threads);
  void (*batch_norm_backward)(const BatchNormBackwardSegment&, DType, double* scratch, int threads);
};

#define HYPERFAST_DECLARE_KERNELS(isa)                                                  \
  namespace isa {                                                                       \
  void generate(const GenerateSegment*, int64_t, DType, int);                           \
  void generate_backward(const GenerateBackwardSegment*, int64_t, DType, double*, int); \
  void adamw_generate(const AdamWGenerateSegment*, int64_t, DType, double, int);        \
  void batch_norm(const BatchNormSegment&, DType, double*, int);                        \
  void batch_norm_backward(const BatchNormBackwardSegment&, DType, double*, int);       \
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
