// How the backward of an LSTM cuts its work, and what scratch it needs; the sizes alone decide.
#pragma once
#include <algorithm>

#include "lstm.h"

namespace hyperfast {

constexpr int64_t kBackwardRows = 16;     // of a tile; a tile is a panel of columns wide
constexpr int64_t kHyperRows = 4;         // of a block of the hyper LSTM, whose columns are not cut
constexpr int64_t kMaxStrips = 16;        // neighbouring panels, whose shares of dz are added up together
constexpr int64_t kCellWork = 6;          // numbers of a unit that a cell keeps from pass to pass
constexpr int64_t kCellSums = 10;         // and that it sums over all rows: the gradients of its norms
constexpr int64_t kWork = 4 + kCellWork;  // with the gates before normalisation
constexpr int64_t kSums = 4 + kCellSums;  // with dbias

struct LstmStrips {
  int64_t panels, count;
  explicit LstmStrips(int64_t H) : panels(count_panels(H)), count(std::min(panels, kMaxStrips)) {}
  Share of(int64_t strip) const { return Share(panels, strip, count); }  // its panels
  int64_t holding(int64_t panel) const { return ((panel + 1) * count - 1) / panels; }
};

// Whether weights are packed once, or a piece at a time in every step. H 512, M 128, Z 16, two cores: one
// step of 1 or 32 rows takes 0.50 or 1.61 ms with weights packed once, 0.33 or 1.47 without; 4 of 8 rows 1.4
// and 1.7.
inline bool packs_weights_backward(const LstmSizes& s) { return s.N > 32; }

// To whole vectors of the narrowest width that holds Z (with_width), for any instruction set.
inline constexpr int64_t padded_embedding(int64_t Z) { return round_up(Z, Z > 8 ? 16 : Z > 4 ? 8 : 4); }

// Mean, inverse deviation and the gradient's two means of a layer norm: x' = (x - mean) inverse, dx = inverse
// (g - offset - x' slope).
template <class C>
struct RowNorm {
  C mean, inverse, offset, slope;
};

// The parts of LstmPacked of the backward. C: the type computed with.
template <class C>
struct LstmBackwardPacked {
  C* weights;  // weight_hh over hyper_weight_xh
  C *hyper_weight_hh, *z_weight, *d_panels;
  C* d_rows;      // [panels, 12, kPanel, padded Z]
  int64_t bytes;  // of all but the first
  LstmBackwardPacked(const LstmSizes& s, const void* weights, const void* scales)
      : weights(static_cast<C*>(const_cast<void*>(weights))) {
    Scratch scratch(const_cast<void*>(scales));
    hyper_weight_hh = scratch.take<C>(packed_size(4 * s.M, s.M));
    z_weight = scratch.take<C>(packed_size(12 * s.Z, s.M));
    d_panels = scratch.take<C>(d_panels_size(s.H, s.Z));
    d_rows = scratch.take<C>(12 * count_panels(s.H) * padded_embedding(s.Z) * kPanel);
    bytes = s.M ? scratch.bytes : 0;
  }
};

inline LstmPackedBytes lstm_backward_packed_bytes(const LstmSizes& s, DType dtype) {
  const bool wide = dtype == DType::float64;
  return {packs_weights_backward(s) ? packed_size(4 * (s.H + s.M), s.H) * (wide ? 8 : 4) : 0,
          wide ? LstmBackwardPacked<double>(s, nullptr, nullptr).bytes
               : LstmBackwardPacked<float>(s, nullptr, nullptr).bytes};
}

template <class C>
struct LstmBackwardScratch {
  C *dh, *dc;              // [panels, B, kPanel], carried from step to step
  C *dhyper_h, *dhyper_c;  // [B, padded M], carried
  C* dh_gates;             // [B, padded 4H], of this step
  C* work;        // with norms [panels, B, kWork, kPanel], else [threads, kBackwardRows, kWork, kPanel]
  C* statistics;  // of rows in a panel [panels, 2 x 5, B]: mean and squares of 4 gates and c
  C *cell_sums, *gate_sums;  // of rows in a panel [panels, 2, B], [panels, 8, B]
  C* dz;                     // [strips, B, 12 padded Z]
  C* z;                      // of a step: [tiles of rows, 4 gates, Z, 3 places, kBackwardRows]
  C* dd_weight;              // [panels, 12, Z, kPanel]
  C* sums;                   // [panels, kSums, kPanel]: dbias, then norms
  C* hyper_sums;             // [blocks of rows, kCellSums, padded M]
  RowNorm<C>* norms;         // [threads, B, 5]
  C* tile;                   // [threads, 12, kBackwardRows, kPanel]
  C* hyper_work;             // [threads, kCellWork, padded M], of one row
  int64_t bytes, padded_M, padded_Z, padded_gates, hyper_blocks;

  LstmBackwardScratch(const LstmSizes& s, bool normed, int threads, void* base) {
    const LstmStrips strips(s.H);
    const int64_t panels = strips.panels, hyper_units = s.M ? 1 : 0;
    padded_M = round_up(s.M, kPanel), padded_Z = padded_embedding(s.Z);
    padded_gates = 4 * s.H + kColumnPad;  // rows do not begin on the same lines of the first cache
    hyper_blocks = hyper_units * ceil_div(s.B, kHyperRows);
    Scratch scratch(base);
    dh = scratch.take<C>(panels * s.B * kPanel);
    dc = scratch.take<C>(panels * s.B * kPanel);
    dhyper_h = scratch.take<C>(s.B * padded_M);
    dhyper_c = scratch.take<C>(s.B * padded_M);
    dh_gates = scratch.take<C>(s.B * padded_gates);
    work = scratch.take<C>((normed ? panels * s.B : threads * kBackwardRows) * kWork * kPanel);
    statistics = scratch.take<C>(normed ? panels * 10 * s.B : 0);
    cell_sums = scratch.take<C>(normed ? panels * 2 * s.B : 0);
    gate_sums = scratch.take<C>(normed ? panels * 8 * s.B : 0);
    dz = scratch.take<C>(strips.count * s.B * 12 * padded_Z);
    z = scratch.take<C>(ceil_div(s.B, kBackwardRows) * kBackwardRows * 12 * s.Z);
    dd_weight = scratch.take<C>(12 * panels * s.Z * kPanel);
    sums = scratch.take<C>(panels * kSums * kPanel);
    hyper_sums = scratch.take<C>(hyper_blocks * kCellSums * padded_M);
    norms = scratch.take<RowNorm<C>>(normed ? threads * s.B * 5 : 0);
    tile = scratch.take<C>(threads * 12 * kBackwardRows * kPanel);
    hyper_work = scratch.take<C>(threads * kCellWork * padded_M);
    bytes = scratch.bytes;
  }
};

inline int64_t lstm_backward_scratch(const LstmSizes& s, bool normed, DType dtype, int threads) {
  return dtype == DType::float64 ? LstmBackwardScratch<double>(s, normed, threads, nullptr).bytes
                                 : LstmBackwardScratch<float>(s, normed, threads, nullptr).bytes;
}

}  // namespace hyperfast
