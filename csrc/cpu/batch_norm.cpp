// Batch norm -> ReLU -> P x P max pool of channels_last images, forward and backward. Without pooling
// something of x's shape may be added before the ReLU, the residual: one more pass each, to read it and to
// write its gradient.
//
// Floor, in passes over x: the forward reads it for the statistics and again to normalise, and writes P^-2 of
// it (y, and a byte for each output); the backward reads it for the sums and again for dx, and writes dx.
// Neither the normalised nor the rectified images exist: the byte says which pixel of the window won, or that
// ReLU is off. All channels of a pixel are taken together, so everything streams. Measured on a Xeon of model
// 207 against it: panels of channels that fit L2 for the second read are slower, going backwards the second
// time gains up to 4 %; dx past the caches takes 1.2 instead of 2.0 ms of 16.8 MB (1.9 and 2.65 with a read).
//
// Sums over the batch are shifted by the median of three pixels of the tile (forward) or the mean (backward).
// A few terms are added in the compute type, the rest in double, and tiles are merged in order (Chan, Golub
// and LeVeque, 1983), so threads do not change a bit. The mean is subtracted as a number of the compute type
// and its rest goes into the offset: nothing cancels where |mean| is much larger than the deviation.
#include <algorithm>

#include "blocks.h"

namespace hyperfast {
namespace {

constexpr int64_t kStreamBytes = 1 << 22;  // a dx beyond this does not stay in cache until it is read

constexpr int64_t kPanel =
    2048;  // elements whose channels are taken one vector at a time, its numbers in registers

// How many of `count` pieces of `size` elements make a panel
inline int64_t panel(int64_t size, int64_t count) {
  return std::min(count, std::max<int64_t>(kPanel / size, 1));
}

// f(c) for every whole vector of channels, then f(c, n) for the n that are left
template <int W, class F>
inline void for_channels(int64_t C, F f) {
  int64_t c = 0;
  for (; c + W <= C; c += W) f(c);
  if (c < C) f(c, int(C - c));
}

template <class S, size_t... I>
inline void add_halves(double* sums, typename S::V v, std::index_sequence<I...>) {
  constexpr int half = S::width / 2;
  using D = Simd<double, half>;
  const auto low = __builtin_shufflevector(v, v, I...), high = __builtin_shufflevector(v, v, (half + I)...);
  D::store(sums, D::load(sums) + __builtin_convertvector(low, typename D::V));
  D::store(sums + half, D::load(sums + half) + __builtin_convertvector(high, typename D::V));
}

template <class V>
inline V median(V a, V b, V c) {
  const V low = a < b ? a : b, high = a < b ? b : a, rest = high < c ? high : c;
  return low < rest ? rest : low;
}

// sums[i] += v[i] for all lanes, or the first n
template <class S>
inline void add_lanes(double* sums, typename S::V v) {
  if constexpr (S::width == 1) *sums += v;
  else if constexpr (sizeof(typename S::C) == 8) S::store(sums, S::load(sums) + v);
  else add_halves<S>(sums, v, std::make_index_sequence<S::width / 2>());
}
template <class S>
inline void add_lanes(double* sums, typename S::V v, int n) {
  typename S::C lanes[S::width];
  Simd<typename S::C, S::width>::store(lanes, v);
  for (int i = 0; i < n; ++i) sums[i] += lanes[i];
}

// Bytes as integers as wide as the lanes of S. By hand where it counts: gcc 12 takes such vectors apart.
template <class S>
struct Bytes {
  static constexpr int W = S::width;
  using Lane = std::conditional_t<sizeof(typename S::C) == 4, int32_t, int64_t>;
  using V = typename VectorOf<Lane, W>::type;

  static V load(const uint8_t* p) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return (V)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    if constexpr (W == 8 && sizeof(Lane) == 8)
      return (V)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)p));
#endif
#if defined(__AVX2__)
    if constexpr (W == 8 && sizeof(Lane) == 4)
      return (V)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#endif
    if constexpr (W == 1) {
      return *p;
    } else {
      V v;
      for (int i = 0; i < W; ++i) v[i] = p[i];
      return v;
    }
  }

  static void store(uint8_t* p, V v) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
    if constexpr (W == 8 && sizeof(Lane) == 8)
      return _mm_storel_epi64((__m128i*)p, _mm512_cvtepi64_epi8((__m512i)v));
#endif
#if defined(__AVX2__)
    if constexpr (W == 8 && sizeof(Lane) == 4) {
      const __m128i words =
          _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
      return _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
    }
#endif
    if constexpr (W == 1) *p = uint8_t(v);
    else
      for (int i = 0; i < W; ++i) p[i] = uint8_t(v[i]);
  }

  // The first n < W lanes; the others are zero.
  static V load(const uint8_t* p, int n) {
    uint8_t bytes[W] = {};
    for (int i = 0; i < W; ++i)
      if (i < n) bytes[i] = p[i];
    return load(bytes);
  }
  static void store(uint8_t* p, V v, int n) {
    uint8_t bytes[W];
    store(bytes, v);
    for (int i = 0; i < W; ++i)
      if (i < n) p[i] = bytes[i];
  }
};

// f(first, groups, n) for groups of n = N in [begin, end), as many as make a panel of size N C, then for
// groups of n = 1
template <int N, class F>
inline void in_groups(int64_t C, int64_t begin, int64_t end, F f) {
  while (begin + N <= end) {
    const int64_t groups = panel(N * C, (end - begin) / N);
    f(begin, groups, std::integral_constant<int, N>());
    begin += groups * N;
  }
  if (begin < end) f(begin, end - begin, std::integral_constant<int, 1>());
}

template <class S, class T>
struct Forward {
  using A = typename S::C;
  using V = typename S::V;
  using Channel = Simd<A, S::width>;
  const BatchNormSegment& s;
  const PooledImages& im;
  const T* x;
  A *center, *scale, *offset;  // [C]: y = (x - center) scale + offset
  double* partial;             // [tiles, 2, C]

  Forward(const BatchNormSegment& s, double* scratch)
      : s(s), im(s.images), x(static_cast<const T*>(s.x)), partial(scratch + 4 * im.C) {
    center = reinterpret_cast<A*>(scratch), scale = center + im.C, offset = scale + im.C;
  }

  int64_t tiles() const { return s.batch ? im.tiles() : 0; }
  int64_t rows() const { return im.window_rows(); }

  // Sums of d = x - shift and of d^2, shift: the median of the tile's first, middle and last pixel
  void sum_tile(int64_t tile) const {
    const int64_t begin = tile * im.tile_pixels(), end = std::min(begin + im.tile_pixels(), im.pixels());
    const T *first = x + begin * im.C, *middle = x + (begin + end) / 2 * im.C, *last = x + (end - 1) * im.C;
    double *sum = partial + tile * 2 * im.C, *square = sum + im.C;
    std::fill_n(sum, 2 * im.C, 0.0);
    const int64_t C = im.C;
    const auto add_pixels = [&](int64_t pixel, int64_t groups, auto count) {
      for_channels<S::width>(C, [&](int64_t c, auto... n) {
        const V shift = median(S::load(first + c, n...), S::load(middle + c, n...), S::load(last + c, n...));
        const T* pixels = x + pixel * C + c;
        for (int64_t group = 0; group < groups; ++group, pixels += count * C) {
          V d1{}, d2{};
          for (int i = 0; i < count; ++i) {
            __builtin_prefetch(pixels + i * C + 2048 / sizeof(T));
            const V d = S::load(pixels + i * C, n...) - shift;
            d1 += d, d2 += d * d;
          }
          add_lanes<S>(sum + c, d1, n...), add_lanes<S>(square + c, d2, n...);
        }
      });
    };
    in_groups<8>(C, begin, end, add_pixels);
  }

  // Mean, variance and coefficients of the channels [c0, c1)
  void merge(int64_t c0, int64_t c1) const {
    for (int64_t tile = 0; tile < tiles(); ++tile) {
      const double *sum = partial + tile * 2 * im.C, *square = sum + im.C;
      const int64_t begin = tile * im.tile_pixels(), end = std::min(begin + im.tile_pixels(), im.pixels());
      const T *first = x + begin * im.C, *middle = x + (begin + end) / 2 * im.C, *last = x + (end - 1) * im.C;
      const double n = double(end - begin), share = n / end;
      for (int64_t c = c0; c < c1; ++c) {
        const double shift = sum[c] / n;
        const double mean = double(median(widen(first[c]), widen(middle[c]), widen(last[c]))) + shift;
        const double before = tile ? s.mean[c] : mean, squares = tile ? s.var[c] : 0.0, delta = mean - before;
        s.mean[c] = before + delta * share;
        s.var[c] = squares + (square[c] - sum[c] * shift) + delta * delta * share * begin;
      }
    }
    const A *weight = static_cast<const A*>(s.weight), *bias = static_cast<const A*>(s.bias);
    const double n = double(im.pixels());
    A* batch = static_cast<A*>(s.batch);
    for (int64_t c = c0; c < c1; ++c) {
      if (batch) batch[c] = A(s.mean[c]), batch[im.C + c] = A(s.var[c] / (n - 1)), s.var[c] /= n;
      const double factor = (weight ? double(weight[c]) : 1.0) / std::sqrt(s.var[c] + s.eps);
      center[c] = A(s.mean[c]), scale[c] = A(factor);
      offset[c] = A((bias ? double(bias[c]) : 0.0) - (s.mean[c] - double(center[c])) * factor);
    }
  }

  // One row of windows
  template <int P, bool adds>
  void apply(int64_t row) const {
    const int64_t rows = im.H / P, C = im.C, begin = row * (im.W / P) * C, end = begin + im.W / P * C;
    const T* window = x + (row / rows * im.H + row % rows * P) * im.W * C;
    const T* residual = static_cast<const T*>(s.residual);
    T* y = static_cast<T*>(s.y);
    uint8_t* index = s.index;
    const A *center = this->center, *scale = this->scale, *offset = this->offset;
    for (int64_t to = begin; to < end; to += C, window += P * C)
      for_channels<S::width>(C, [&](int64_t c, auto... n) {
        const V m = Channel::load(center + c, n...), a = Channel::load(scale + c, n...);
        const V b = Channel::load(offset + c, n...);
        V best = (S::load(window + c, n...) - m) * a + b;
        if constexpr (adds) best += S::load(residual + to + c, n...);
        typename Bytes<S>::V winner{};
        for (int i = 1; i < P * P; ++i) {
          const V v = (S::load(window + (i / P * im.W + i % P) * C + c, n...) - m) * a + b;
          winner = v > best ? winner - winner + i : winner;
          best = v > best ? v : best;
          winner = v != v ? winner - winner + i : winner;  // as torch: the last NaN wins
          best = v != v ? v : best;
        }
        S::store(y + to + c, best <= 0 ? V{} : best, n...);
        if (index) Bytes<S>::store(index + to + c, best <= 0 ? winner - winner + P * P : winner, n...);
      });
  }
};

template <class S, class T>
struct Backward {
  using A = typename S::C;
  using V = typename S::V;
  using Channel = Simd<A, S::width>;
  using Winner = typename Bytes<S>::V;
  const BatchNormBackwardSegment& s;
  const PooledImages& im;
  const T *x, *dy;
  T* dx;
  A *center, *factor, *slope, *offset;  // [C]: dx = factor g + (x - center) slope + offset
  double* partial;                      // [tiles, 2, C]
  bool streams;

  Backward(const BatchNormBackwardSegment& s, double* scratch)
      : s(s),
        im(s.images),
        x(static_cast<const T*>(s.x)),
        dy(static_cast<const T*>(s.dy)),
        dx(static_cast<T*>(s.dx)),
        partial(scratch + 4 * im.C) {
    center = reinterpret_cast<A*>(scratch), factor = center + im.C;
    slope = factor + im.C, offset = slope + im.C;
    for (int64_t c = 0; c < im.C; ++c) center[c] = A(s.mean[c]);
    streams = (reinterpret_cast<uintptr_t>(dx) | im.C * sizeof(T)) % (S::width * sizeof(T)) == 0 &&
              im.pixels() * im.C * int64_t(sizeof(T)) > kStreamBytes;
  }

  int64_t tiles() const { return im.window_tiles(); }
  int64_t rows() const { return dx ? im.B * ((im.H + im.P - 1) / im.P) : 0; }

  // Sums of g and of g (x - center) over the windows of a tile; g: dy where ReLU is on
  template <int P>
  void sum_tile(int64_t tile) const {
    const int64_t first = tile * im.tile_window_rows();
    const int64_t last = std::min(first + im.tile_window_rows(), im.window_rows());
    const int64_t rows = im.H / P, columns = im.W / P, C = im.C, below = im.W * C;
    double *sum = partial + tile * 2 * C, *product = sum + C;
    std::fill_n(sum, 2 * C, 0.0);
    // windows [from, from + groups * count) of one row, whose first is at `window`
    const auto add_windows = [&](const T* window, int64_t from, int64_t groups, auto count) {
      for_channels<S::width>(C, [&](int64_t c, auto... n) {
        const V m = Channel::load(center + c, n...);
        const uint8_t* index = s.index + from * C + c;
        const T *dy = this->dy + from * C + c, *pixel = window + c;
        for (int64_t group = 0; group < groups; ++group) {
          V g1{}, g2{};
          for (int k = 0; k < count; ++k, index += C, dy += C, pixel += P * C) {
            const Winner winner = Bytes<S>::load(index, n...);
            V v = S::load(pixel, n...);
            for (int i = 1; i < P * P; ++i)
              v = winner == i ? S::load(pixel + i / P * below + i % P * C, n...) : v;
            const V g = winner < P * P ? S::load(dy, n...) : V{};
            g1 += g, g2 += g * (winner < P * P ? v - m : V{});
          }
          add_lanes<S>(sum + c, g1, n...), add_lanes<S>(product + c, g2, n...);
        }
      });
    };
    if constexpr (P == 1) {  // rows follow one another
      in_groups<8>(C, first * columns, last * columns, [&](int64_t pixel, int64_t groups, auto count) {
        add_windows(x + pixel * C, pixel, groups, count);
      });
    } else {
      for (int64_t row = first; row < last; ++row) {
        const T* pixels = x + (row / rows * im.H + row % rows * P) * below;
        in_groups<4>(P * P * C, 0, columns, [&](int64_t column, int64_t groups, auto count) {
          add_windows(pixels + column * P * C, row * columns + column, groups, count);
        });
      }
    }
  }

  // dweight, dbias and the coefficients of dx, channels [c0, c1)
  void merge(int64_t c0, int64_t c1) const {
    double *sum = partial, *product = partial + im.C;
    for (int64_t tile = 1; tile < tiles(); ++tile)
      for (int64_t c = c0; c < c1; ++c) {
        sum[c] += sum[tile * 2 * im.C + c];
        product[c] += product[tile * 2 * im.C + c];
      }
    const A* weight = static_cast<const A*>(s.weight);
    for (int64_t c = c0; c < c1; ++c) {
      const double rest = s.mean[c] - double(center[c]), inverse = 1 / std::sqrt(s.var[c] + s.eps);
      const double dweight = (product[c] - rest * sum[c]) * inverse, n = double(im.pixels());
      const double a = (weight ? double(weight[c]) : 1.0) * inverse, k = -a * inverse * dweight / n;
      static_cast<A*>(s.dweight)[c] = A(dweight), static_cast<A*>(s.dbias)[c] = A(sum[c]);
      factor[c] = A(a), slope[c] = A(k), offset[c] = A(-a * sum[c] / n - k * rest);
    }
  }

  // dx of pixels that are in no window
  template <bool given>
  void outside(int64_t pixel, int64_t count) const {
    for (int64_t at = pixel * im.C; at < (pixel + count) * im.C; at += im.C)
      for_channels<S::width>(im.C, [&](int64_t c, auto... n) {
        V d{};
        if constexpr (!given)
          d = (S::load(x + at + c, n...) - Channel::load(center + c, n...)) * Channel::load(slope + c, n...) +
              Channel::load(offset + c, n...);
        S::store(dx + at + c, d, n...);
      });
  }

  // dx of one row of windows, or of a last row of pixels that fill none
  template <int P, bool given, bool streams, bool adds>
  void apply(int64_t row) const {
    const int64_t rows = (im.H + P - 1) / P, columns = im.W / P, C = im.C, below = im.W * C;
    const int64_t pixel = (row / rows * im.H + row % rows * P) * im.W;
    if (row % rows == im.H / P) return outside<given>(pixel, im.W);
    const int64_t begin = (row / rows * (im.H / P) + row % rows) * columns * C;
    const uint8_t* index = s.index + begin;
    const T *x = this->x + pixel * C, *dy = this->dy + begin;
    const A *center = this->center, *factor = this->factor, *slope = this->slope, *offset = this->offset;
    T *dx = this->dx + pixel * C, *dresidual = static_cast<T*>(s.dresidual) + (adds ? pixel * C : 0);
    for (int64_t column = 0; column < columns; ++column) {
      for_channels<S::width>(C, [&](int64_t c, auto... n) {
        const Winner winner = Bytes<S>::load(index + c, n...);
        const V passed = S::load(dy + c, n...), g = passed * Channel::load(factor + c, n...);
        const V m = Channel::load(center + c, n...), k = Channel::load(slope + c, n...);
        const V b = Channel::load(offset + c, n...);
        V d[P * P];
        for (int i = 0; i < P * P; ++i) {
          d[i] = winner == i ? g : V{};
          if constexpr (!given) d[i] += (S::load(x + i / P * below + i % P * C + c, n...) - m) * k + b;
        }
        if constexpr (adds) S::store(dresidual + c, winner == 0 ? passed : V{}, n...);
        for (int i = 0; i < P * P; ++i) {
          T* to = dx + i / P * below + i % P * C + c;
          if constexpr (streams && sizeof...(n) == 0) S::stream(to, d[i]);
          else S::store(to, d[i], n...);
        }
      });
      index += C, dy += C, x += P * C, dx += P * C;
      if constexpr (adds) dresidual += C;
    }
    if (im.W % P)
      for (int i = 0; i < P; ++i) outside<given>(pixel + i * im.W + im.W - 1, 1);
  }
};

// Sums of all tiles, coefficients of all channels, then all rows; handed to threads as they become free.
template <class Work, class SumTile, class Apply>
void run(const Work& work, int threads, SumTile sum_tile, Apply apply) {
  const PooledImages& im = work.im;
  const int64_t tiles = work.tiles(), rows = work.rows();
  const int64_t chunk = 1 + 32768 / (im.P * im.W * im.C);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < tiles; ++tile) sum_tile(tile);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < im.C; c += 16) work.merge(c, std::min<int64_t>(c + 16, im.C));
#pragma omp for schedule(dynamic, chunk)
    for (int64_t row = 0; row < rows; ++row) apply(row);
    stream_fence();
  }
}

// f(P) with a constant
template <class F>
void with_window(int64_t P, F f) {
  if (P == 1) f(std::integral_constant<int, 1>());
  else f(std::integral_constant<int, 2>());
}

}  // namespace

namespace HYPERFAST_ISA {

void batch_norm(const BatchNormSegment& segment, DType dtype, double* scratch, int threads) {
  with_dtype(dtype, [&](auto t) {
    with_width<decltype(t)>(segment.images.C, [&](auto simd) {
      const Forward<decltype(simd), decltype(t)> work(segment, scratch);
      with_window(segment.images.P, [&](auto P) {
        const auto apply = [&](auto adds) {
          run(
              work, threads, [&](int64_t tile) { work.sum_tile(tile); },
              [&](int64_t row) { work.template apply<P, adds>(row); });
        };
        if (P == 1 && segment.residual) apply(std::bool_constant<P == 1>());
        else apply(std::false_type());
      });
    });
  });
}

void batch_norm_backward(const BatchNormBackwardSegment& segment, DType dtype, double* scratch, int threads) {
  with_dtype(dtype, [&](auto t) {
    with_width<decltype(t)>(segment.images.C, [&](auto simd) {
      const Backward<decltype(simd), decltype(t)> work(segment, scratch);
      with_window(segment.images.P, [&](auto P) {
        const auto sum_tile = [&](int64_t tile) { work.template sum_tile<P>(tile); };
        const auto apply = [&](auto given, auto streams) {
          const auto chosen = [&](auto adds) {
            run(work, threads, sum_tile,
                [&](int64_t row) { work.template apply<P, given, streams, adds>(row); });
          };
          if (P == 1 && segment.dresidual) chosen(std::bool_constant<P == 1>());
          else chosen(std::false_type());
        };
        if (segment.given) apply(std::true_type(), std::false_type());
        else if (work.streams) apply(std::false_type(), std::true_type());
        else apply(std::false_type(), std::false_type());
      });
    });
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
