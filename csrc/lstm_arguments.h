// What the LSTM kernels of the CPU and of a GPU take alike: sizes, weights, dropout.
#pragma once
#include <cstdint>

namespace hyperfast {

// One layer of an LSTM of H units over rows packed step by step, or of a HyperLSTM, whose hyper LSTM of M
// units makes embeddings of Z numbers; the equations are in hyperfast/reference.py. Step t has the next
// batch_sizes[t] of N rows, falling from B; row b of a step goes on with row b of the one before.
struct LstmSizes {
  int64_t T, N, B, H, M, Z;    // M = Z = 0: no hyper LSTM, and everything of it below is null
  const int64_t* batch_sizes;  // [T]
};
struct LstmNorms {                        // of n units; all null without layer normalisation
  const void *gates_weight, *gates_bias;  // [4n]
  const void *cell_weight, *cell_bias;    // [n]
};
struct LstmWeights {
  const void *weight_hh, *bias;                   // [4H, H], [4H]
  const void *hyper_weight_xh, *hyper_weight_hh;  // [4M, H], [4M, M]
  const void *z_weight, *z_bias;                  // [12Z, M], [12Z]
  const void* d_weight;                           // [12, H, Z]
  LstmNorms norms, hyper_norms;
};
struct LstmDropout {   // recurrent, by hyperfast.reference.dropout_scale
  const int64_t* key;  // [1]
  double share;        // 0: none, key null
  int64_t first_row;   // the number of these rows' first among those of the whole sequence
};

}  // namespace hyperfast
