// How a generated matrix product is cut into units of work; the sizes alone decide.
#pragma once
#include "kernels.h"
#include "scratch.h"

namespace hyperfast {

constexpr int64_t kTileOutputs = 8, kTileColumns = 512;     // forward: 16 KiB of float32 weights
constexpr int64_t kStripOutputs = 32, kStripColumns = 128;  // backward: 8 KiB of w, 8 KiB of dw
constexpr int64_t kUnits = 16;  // cut further, and add up parts afterwards, where there would be fewer units

// How many parts `length` is cut into, so that `units` times as many are about kUnits, each a multiple of
// `grain`.
struct Cut {
  int64_t size, parts;
  Cut(int64_t length, int64_t units, int64_t grain) {
    const int64_t wanted = ceil_div(kUnits, units), grains = ceil_div(length, grain);
    size = ceil_div(grains, wanted < grains ? wanted : grains) * grain;
    parts = ceil_div(length, size);
  }
};

// A unit is kTileOutputs outputs of a group and a chunk of its columns.
struct ForwardUnits {
  int64_t strips, chunk_columns, chunks, count;
  explicit ForwardUnits(const HyperLinearSizes& s) : strips(ceil_div(s.O, kTileOutputs)) {
    const Cut cut(s.I, s.G * strips, kTileColumns);
    chunk_columns = cut.size, chunks = cut.parts;
    count = s.G * strips * chunks;
  }
};

// A unit is kStripColumns columns of a group and a share of its outputs.
struct BackwardUnits {
  int64_t strips, split_outputs, splits, count;
  explicit BackwardUnits(const HyperLinearSizes& s) : strips(ceil_div(s.I, kStripColumns)) {
    const Cut cut(s.O, s.G * strips, kStripOutputs);
    split_outputs = cut.size, splits = cut.parts;
    count = s.G * strips * splits;
  }
};

// Bytes of scratch the kernels need; compute_size: of one number of the type computed with.
inline int64_t forward_scratch(const HyperLinearSizes& s, int64_t compute_size) {
  const ForwardUnits units(s);
  return units.chunks > 1 ? units.chunks * s.M * s.G * s.O * compute_size : 0;
}
inline int64_t backward_scratch(const HyperLinearSizes& s, int64_t compute_size, bool with_dx) {
  const BackwardUnits units(s);
  const int64_t parts = with_dx && units.splits > 1 ? units.splits : 0;
  return units.count * s.K * int64_t(sizeof(double)) + parts * s.G * s.M * s.padded() * compute_size;
}

}  // namespace hyperfast
