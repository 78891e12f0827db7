// CPU kernels over plain pointers. Letters: N generated weights of a layer, K embedding size.
//
// One call covers all layers through a table of segments. Every segment is cut into blocks of rows whose size
// depends on K alone, so that sums over N are added in the same order whatever the number of threads.
#pragma once
#include <array>
#include <cstdint>

#include "../lstm_arguments.h"

namespace hyperfast {

constexpr int64_t kMaxK = 512;      // z is held on the stack of each thread
constexpr int64_t kColumnPad = 16;  // columns of a matrix product come in multiples of this

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

// A matrix product with weights that are generated a tile at a time and never written as a whole:
// y[m, g O + o] = sum_i x[g, m, i] w[g, o, i] + layer_bias[g O + o], w[n] = sum_k weight[n, k] z[k] + bias[n]
// with n = (g O + o) I + i. x, y and layer_bias are in the type computed with, float for bfloat16 generators.
// A convolution of G groups is this product over its columns, a linear layer has G = 1.
struct HyperLinearSizes {
  int64_t G, M, O, I, K;
  int64_t padded() const { return (I + kColumnPad - 1) / kColumnPad * kColumnPad; }
};
struct HyperLinear {
  const void *weight, *bias, *z;  // [G O I, K], [G O I] or null, [K]
  const void* x;                  // [G, M, padded I], zeros beyond I
  const void* layer_bias;         // [G O] or null
  void* y;                        // [M, G O]
  HyperLinearSizes sizes;
};
// dx[g, m, i] = sum_o dy[g O + o, m] w[g, o, i], dw[g, o, i] = sum_m dy[g O + o, m] x[g, m, i],
// dz[k] = sum_n dw[n] weight[n, k]. Each of the three is made where its pointer is not null.
struct HyperLinearBackward {
  const void *weight, *bias, *z, *x;  // as above
  const void* dy;                     // [G O, M], in the type computed with
  void* dx;                           // [G, M, padded I], in the type computed with
  void *dz, *dw;                      // [K], [G O I]
  HyperLinearSizes sizes;
};

// Kernels of many layers from one matrix product (hyperfast/reference.py, generate_units): u = a weight +
// bias [P, C], read in order, is E units [O, I, T]; T: elements of a kernel, R S of a 2-D one. A layer is
// tiled by the next `units` of them, `across` side by side in its input channels.
struct UnitLayer {
  const void* dw;  // backward; null: zeros
  void* w;         // [m O, n I, T], or [m O, T, n I] in channels_last; backward: read where l2 is not 0
  int64_t units, across;
};
struct UnitSizes {
  int64_t P, D, C, O, I, T;
  bool channels_last;
  int64_t unit() const { return O * I * T; }
  int64_t units() const { return P * C / unit(); }
};
struct GenerateUnits {
  const UnitLayer* layers;
  int64_t count;
  const void *a, *weight, *bias;  // [P, D], [D, C], [C] or null
  UnitSizes sizes;
};
// du = dw + l2 w of all layers, unit by unit [P, C]; da = du weight^T, dweight = a^T du, dbias = sum over the
// rows of du. Each of the three is made where its pointer is not null.
struct GenerateUnitsBackward {
  const UnitLayer* layers;
  int64_t count;
  const void *a, *weight;  // [P, D], [D, C]
  void *da, *dweight, *dbias;
  double l2;
  UnitSizes sizes;
};

// products[b, t, i, k] = x[b, t, i] z[b, k]
struct OuterProductSizes {
  int64_t B, T, I, K;
};
struct OuterProduct {
  const void *x, *z;  // [B, T, I], [B, K]
  void* products;     // [B, T, I, K]
  OuterProductSizes sizes;
};
// dx[b, t, i] = sum_k dproducts[b, t, i, k] z[b, k], dz[b, k] = sum_ti dproducts[b, t, i, k] x[b, t, i]. Each
// is made where its pointer is not null.
struct OuterProductBackward {
  const void *dproducts, *x, *z;
  void *dx, *dz;  // like x and z
  bool add;       // dx is added to
  OuterProductSizes sizes;
};

// Between images and the columns of a convolution: columns[g, m, (c, r, s)] = image[b, g C / G + c, y, x]
// with m = (b, h', w'), y = h' stride + r dilation - padding, x likewise, zero outside the image.
struct Im2col {
  void* image;    // [B, C, H, W] with image_strides
  void* columns;  // [G, B H' W', padded C / G R S]
  int64_t B, C, H, W, R, S, out_H, out_W, G;
  int64_t stride[2], padding[2], dilation[2];
  int64_t image_strides[4];
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

// y = max over the window of max(0, (x - mean) / sqrt(var + eps) weight + bias + residual)
struct BatchNormSegment {
  PooledImages images;
  const void* x;              // [B, H, W, C]
  const void *weight, *bias;  // [C], float where x is bfloat16; null: 1 and 0
  const void* residual;       // like x, P 1; or null
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
  void* dresidual;        // like x, P 1, beside dx; or null
  void *dweight, *dbias;  // like weight
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

// An LSTM over a sequence; float32 or float64.
// Weights as the kernels multiply by them, packed once for all parts of a sequence (lstm.h, lstm_backward.h).
// Null: they are multiplied by as they lie.
struct LstmPacked {
  const void *weights, *scales;
};
struct Lstm {
  LstmSizes sizes;
  LstmWeights weights;
  LstmPacked packed;
  LstmDropout dropout;
  double eps;
  const void *x_gates, *hyper_x_gates;        // [N, 4H], [N, 4M]; hyper_x_gates may be hyper_gates
  const void *h0, *c0, *hyper_h0, *hyper_c0;  // [B, H] twice, [B, M] twice
  void *h, *c, *hyper_h, *hyper_c;            // [N, H] twice, [N, M] twice: of every step
  void* h_gates;                              // [N, 4H] weight_hh h, for the backward; null: not kept
  void* hyper_gates;  // [N, 4M] the hyper LSTM's gates before normalisation, for the backward; null: not kept
};
// The gradients that need the steps in turn; those of weights [.., H] and [.., M] are products over all rows
// of what this writes. Gradients that come in may be null: zero.
struct LstmBackward {
  LstmSizes sizes;
  LstmWeights weights;
  LstmPacked packed;  // its scales are always there with a hyper LSTM
  LstmDropout dropout;
  double eps;
  const void *x_gates, *c0, *hyper_c0;                            // as in Lstm
  const void *c, *hyper_c, *h_gates, *hyper_gates;                // what it left
  const void* z;                                                  // [N, 12Z] hyper_h z_weight^T + z_bias
  const void* dh;                                                 // [N, H]
  const void *dh_last, *dc_last, *dhyper_h_last, *dhyper_c_last;  // [B, H] twice, [B, M] twice
  void *dx_gates, *dh_gates;  // [N, 4H] twice; dx_gates may be x_gates; dh_gates null without hyper: dx_gates
  void *dhyper_gates, *dz;    // [N, 4M], [N, 12Z]
  void *dh0, *dc0, *dhyper_h0, *dhyper_c0;  // [B, H] twice, [B, M] twice; may be those of the last states
  void *dbias, *dd_weight;                  // [4H], [12, H, Z]
  std::array<void*, 4> dnorms;              // [4H], [4H], [H], [H], in the order of LstmNorms
  std::array<void*, 4> dhyper_norms;        // [4M], [4M], [M], [M]
};

struct Kernels {
  const char* isa;
  void (*generate)(const GenerateSegment*, int64_t count, DType, int threads);
  // scratch: sum over segments of num_blocks(N, K) * (K + 1) doubles
  void (*generate_backward)(const GenerateBackwardSegment*, int64_t count, DType, double* scratch,
                            int threads);
  // every dw is multiplied by grad_scale first (gradient clipping)
  void (*update_generate)(const UpdateGenerateSegment*, int64_t count, DType, Rule, Storage,
                          double grad_scale, int threads);
  // scratch: forward_scratch and backward_scratch bytes (hyper_linear.h)
  void (*hyper_linear)(const HyperLinear&, DType, void* scratch, int threads);
  void (*hyper_linear_backward)(const HyperLinearBackward&, DType, void* scratch, int threads);
  // stored: of the layers, dtype or bfloat16 beside float32. scratch: bytes as in generate_units.h
  void (*generate_units)(const GenerateUnits&, DType, DType stored, void* scratch, int threads);
  void (*generate_units_backward)(const GenerateUnitsBackward&, DType, DType stored, void* scratch,
                                  int threads);
  void (*outer_product)(const OuterProduct&, DType, int threads);
  void (*outer_product_backward)(const OuterProductBackward&, DType, int threads);
  void (*im2col)(const Im2col&, DType, int threads);
  void (*col2im)(const Im2col&, DType, int threads);  // its transpose: image = sum of its columns
  // dtype float32 or float64. threads: lstm_threads; scratch: lstm_scratch bytes for as many; packed by
  // lstm_pack into memory of lstm_packed_bytes (lstm.h)
  void (*lstm_pack)(const LstmSizes&, const LstmWeights&, void* weights, void* scales, DType, int threads);
  void (*lstm)(const Lstm&, DType, void* scratch, int threads);
  // likewise (lstm_backward.h)
  void (*lstm_backward_pack)(const LstmSizes&, const LstmWeights&, void* weights, void* scales, DType,
                             int threads);
  void (*lstm_backward)(const LstmBackward&, DType, void* scratch, int threads);
  // scratch: images.scratch() doubles
  void (*batch_norm)(const BatchNormSegment&, DType, double* scratch, int threads);
  void (*batch_norm_backward)(const BatchNormBackwardSegment&, DType, double* scratch, int threads);
};

#define HYPERFAST_DECLARE_KERNELS(isa)                                                            \
  namespace isa {                                                                                 \
  void generate(const GenerateSegment*, int64_t, DType, int);                                     \
  void generate_backward(const GenerateBackwardSegment*, int64_t, DType, double*, int);           \
  void update_generate(const UpdateGenerateSegment*, int64_t, DType, Rule, Storage, double, int); \
  void hyper_linear(const HyperLinear&, DType, void*, int);                                       \
  void hyper_linear_backward(const HyperLinearBackward&, DType, void*, int);                      \
  void generate_units(const GenerateUnits&, DType, DType, void*, int);                            \
  void generate_units_backward(const GenerateUnitsBackward&, DType, DType, void*, int);           \
  void outer_product(const OuterProduct&, DType, int);                                            \
  void outer_product_backward(const OuterProductBackward&, DType, int);                           \
  void im2col(const Im2col&, DType, int);                                                         \
  void col2im(const Im2col&, DType, int);                                                         \
  void lstm_pack(const LstmSizes&, const LstmWeights&, void*, void*, DType, int);                 \
  void lstm(const Lstm&, DType, void*, int);                                                      \
  void lstm_backward_pack(const LstmSizes&, const LstmWeights&, void*, void*, DType, int);        \
  void lstm_backward(const LstmBackward&, DType, void*, int);                                     \
  void batch_norm(const BatchNormSegment&, DType, double*, int);                                  \
  void batch_norm_backward(const BatchNormBackwardSegment&, DType, double*, int);                 \
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
