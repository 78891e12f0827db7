// How the product behind generated units is cut into tiles and tasks, and what scratch it needs; the sizes
// alone decide.
#pragma once
#include <algorithm>
#include <numeric>

#include "hyper_linear.h"

namespace hyperfast {

constexpr int64_t kTile = 64;        // rows, and at most this many columns, of a tile: 16 KiB of float32
constexpr int64_t kUnitsTasks = 16;  // of the backward, each with sums of its own

// Columns of u lie in blocks of `width`, the last one padded like the others; in channels_last they are
// permuted so that what is consecutive in a layer is consecutive here: in runs of `run`, of which a unit has
// `runs`.
struct UnitColumns {
  int64_t blocks, width, padded, run, runs, group;
  explicit UnitColumns(const UnitSizes& s)
      : blocks(ceil_div(s.C, kTile)),
        width(round_up(ceil_div(s.C, blocks), kColumnPad)),
        padded(blocks * width),
        run(std::gcd(s.C, s.I * s.T)),
        group(run) {
    if (s.channels_last) run = group % s.T ? 1 : group / s.T;
    runs = s.unit() / run;
  }
  // The column of weight that comes at c: [channels, T] of a group as [T, channels].
  int64_t source(const UnitSizes& s, int64_t c) const {
    if (!s.channels_last || group % s.T) return c;
    const int64_t channels = group / s.T, first = c / group * group, i = c - first;
    return first + i % channels * s.T + i / channels;
  }
};

// Tasks of the backward: `splits` of the rows times `chunks` of the columns. da is summed over the chunks,
// dweight and dbias over the splits: as few numbers as make kUnitsTasks tasks.
struct UnitTasks {
  int64_t split_rows, splits, chunk_blocks, chunks;
  UnitTasks(const UnitSizes& s, const UnitColumns& columns) {
    const int64_t row_blocks = ceil_div(s.P, kTile);
    int64_t best = -1;
    for (int64_t wanted = 1; wanted <= std::min(columns.blocks, kUnitsTasks); ++wanted) {
      const int64_t in_chunk = ceil_div(columns.blocks, wanted), cut = ceil_div(columns.blocks, in_chunk);
      const int64_t in_split = ceil_div(row_blocks, std::min(row_blocks, ceil_div(kUnitsTasks, cut)));
      const int64_t rows_cut = ceil_div(row_blocks, in_split);
      const int64_t numbers = (cut > 1 ? cut * s.P : 0) + rows_cut * s.C;
      if (best >= 0 && numbers >= best) continue;
      best = numbers;
      split_rows = in_split * kTile, splits = rows_cut, chunk_blocks = in_chunk, chunks = cut;
    }
  }
};

// Where in a layer that is `across` units wide a run of a unit begins: `outer` times the width I across plus
// `inner`.
struct UnitRun {
  int64_t outer, inner;
};
// Where a unit begins in its layer, and the layer's input channels.
struct UnitPlace {
  const char* dw;
  char* w;
  int64_t channels;
};

// C: the type computed with.
template <class C>
struct UnitsScratch {
  int64_t* source;    // [C]
  UnitRun* runs;      // [runs]
  UnitPlace* places;  // [E]
  C* a;               // [P, D], where it is stored as another type
  C* weight;          // forward: [blocks, D, width]; backward, transposed: [blocks, width, padded D]
  C* bias;            // forward: [padded C]
  C* da;              // backward: [chunks, P, padded D]
  C* dweight;         // backward: [splits, blocks, D, width]
  C* dbias;           // backward: [splits, padded C]
  int64_t bytes;
  UnitsScratch(const UnitSizes& s, bool converts, bool backward, void* base) {
    const UnitColumns columns(s);
    const UnitTasks tasks(s, columns);
    const int64_t padded_D = round_up(s.D, kColumnPad);
    Scratch scratch(base);
    source = scratch.take<int64_t>(s.C);
    runs = scratch.take<UnitRun>(columns.runs);
    places = scratch.take<UnitPlace>(s.units());
    a = scratch.take<C>(converts ? s.P * s.D : 0);
    weight = scratch.take<C>(columns.padded * (backward ? padded_D : s.D));
    bias = scratch.take<C>(backward ? 0 : columns.padded);
    da = scratch.take<C>(backward ? tasks.chunks * s.P * padded_D : 0);
    dweight = scratch.take<C>(backward ? tasks.splits * s.D * columns.padded : 0);
    dbias = scratch.take<C>(backward ? tasks.splits * columns.padded : 0);
    bytes = scratch.bytes;
  }
};

inline int64_t units_scratch(const UnitSizes& s, DType dtype, bool backward) {
  return dtype == DType::float64 ? UnitsScratch<double>(s, false, backward, nullptr).bytes
                                 : UnitsScratch<float>(s, dtype != DType::float32, backward, nullptr).bytes;
}

}  // namespace hyperfast
