// Launchers of the CUDA kernels, free of CUDA and torch headers. Letters: N generated weights of a layer, K
// embedding size, M rows of x, O outputs, I inputs.
//
// Pointers are device pointers to contiguous data. A launcher queues its kernels on `stream` (a cudaStream_t)
// of the current device, allocates nothing and waits for nothing; it returns null, or CUDA's words for what
// failed. One launch covers as many segments (layers) as fit into its parameters.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../lstm_arguments.h"

namespace hyperfast::cuda {

enum class DType { f32, f64, f16, bf16 };

constexpr int kMaxK = 512;  // longest embedding

// out[n] = sum_k weight[n, k] z[k] + bias[n]
struct GenerateSegment {
  const void* weight;  // [N, K]
  const void* bias;    // [N] or null
  const void* z;       // [K]
  void* out;           // [N]
  int64_t N;           // >= 1
  int K;               // 1 .. kMaxK
};
const char* generate(const GenerateSegment* segments, size_t count, DType dtype, uintptr_t stream);

// dz[k] = sum_n weight[n, k] dw[n],  squared_norm = sum_n dw[n]^2
struct GenerateBackwardSegment {
  const void* weight;    // [N, K]
  const void* dw;        // [N]
  void* dz;              // [K]
  double* squared_norm;  // scalar
  int64_t N;             // >= 0
  int K;
};
int64_t generate_backward_scratch(int64_t N, int K);  // doubles that a segment needs
// scratch: as many as all segments need
const char* generate_backward(const GenerateBackwardSegment* segments, size_t count, double* scratch,
                              DType dtype, uintptr_t stream);

// Rules, and how states are stored; equations and formats: csrc/cpu/kernels.h, hyperfast/states.py.
enum class Rule { adam, sgd };
enum class Storage { plain, bfloat16, eight_bit };

struct Updated {
  void* values;
  void* states[2];   // like values, bfloat16 or codes; null: no such state
  float* scales[2];  // eight_bit: one for every rows_per_scale(K) rows
};

// The rule on weight with the gradient dw outer z, on bias with dw, then w[n] = sum_k weight[n, k] z_next[k]
// + bias[n].
struct UpdateGenerateSegment {
  Updated weight, bias;    // [N, K], [N]; bias may be null
  const void* dw;          // [N]
  const void *z, *z_next;  // [K]; before and after the update of z
  void* w;                 // [N], the next weights
  int64_t N;               // >= 1
  int K;
  int layer;  // its row in UpdateGenerateNumbers
  bool bias_is_trained;
};

// The numbers of a step, in device memory.
struct UpdateGenerateNumbers {
  const double *coefficients, *bias_coefficients;  // [L, 7 for adam, 6 for sgd]: hyperfast/reference.py
  const double* grad_scale;                        // every dw is multiplied by it
  const int64_t* seeds;                            // [L], of stochastic rounding
  const float* skip;  // or null; nonzero: only w is written, from what weight and bias are
};
// with_states: of an sgd rule, whether it has momentum.
const char* update_generate(const UpdateGenerateSegment* segments, size_t count,
                            const UpdateGenerateNumbers& numbers, Rule rule, bool with_states,
                            Storage storage, DType dtype, uintptr_t stream);

// y[m, o] = sum_i x[m, i] w[o, i] + layer_bias[o], w[o, i] = sum_k weight[n, k] z[k] + bias[n], n = o I + i.
constexpr int64_t kMaxRows = 64;
struct HyperLinear {
  const void *weight, *bias, *z;  // [O I, K], [O I] or null, [K]
  const void* x;                  // [M, I]
  const void* layer_bias;         // [O] or null
  void* y;                        // [M, O]
  float* scratch;                 // hyper_linear_scratch floats
  int64_t M, O, I;                // 1 .. kMaxRows, >= 1, >= 1
  int K;
};
int64_t hyper_linear_scratch(int64_t M, int64_t O, int64_t I, int K, DType dtype);
const char* hyper_linear(const HyperLinear& call, DType dtype, uintptr_t stream);  // not for f64

// One layer of an LSTM, or of a HyperLSTM, over a whole sequence: hyperfast/reference.py, lstm_arguments.h.
// T, N, B, H are at least 1, batch_sizes are the host's. Null are: hyper tensors without a hyper LSTM (M = Z
// = 0), norms without layer normalisation, key without dropout, h_gates and hyper_gates where they are not
// kept, gradients that come in where they are zero, and dh_gates without hyper (it is dx_gates). float32:
// norms, c, hyper_c and their gradients, whatever the dtype.
struct Lstm {
  LstmSizes sizes;
  LstmWeights weights;
  LstmDropout dropout;
  double eps;
  const void *x_gates, *hyper_x_gates;        // [N, 4H], [N, 4M]
  const void *h0, *c0, *hyper_h0, *hyper_c0;  // [B, H] twice, [B, M] twice
  void *h, *c, *hyper_h, *hyper_c;            // [N, H] twice, [N, M] twice
  void *h_gates, *hyper_gates;                // [N, 4H], [N, 4M]
  float* scratch;                             // lstm_scratch floats, 16-byte aligned
};
struct LstmBackward {
  LstmSizes sizes;
  LstmWeights weights;
  LstmDropout dropout;
  double eps;
  const void *x_gates, *c0, *hyper_c0, *c, *hyper_c, *h_gates, *hyper_gates;
  const void* z;                                                  // [N, 12Z]
  const void* dh;                                                 // [N, H]
  const void *dh_last, *dc_last, *dhyper_h_last, *dhyper_c_last;  // [B, H] twice, [B, M] twice
  void *dx_gates, *dh_gates, *dhyper_gates, *dz;                  // [N, 4H] twice, [N, 4M], [N, 12Z]
  void *dh0, *dc0, *dhyper_h0, *dhyper_c0;
  void *dbias, *dd_weight;  // [4H], [12, H, Z]
  void *dnorms[4], *dhyper_norms[4];
  float* scratch;
};
// Null, or why the kernel does not serve these sizes on the current device; the launchers say it too.
const char* lstm_refuses(const LstmSizes& sizes, DType dtype, bool backward);
int64_t lstm_scratch(const LstmSizes& sizes, DType dtype, bool backward);  // 0: refused
const char* lstm(const Lstm& call, DType dtype, uintptr_t stream);
const char* lstm_backward(const LstmBackward& call, DType dtype, uintptr_t stream);

}  // namespace hyperfast::cuda
