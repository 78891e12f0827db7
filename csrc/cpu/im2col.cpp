// Between images and the columns of a convolution, for the few rows of hyper_linear. Floor: the columns are
// written (im2col) or read (col2im) once; the image is up to R S times smaller.
#include "blocks.h"

namespace hyperfast {
namespace {

// Calls body(offset in the image, offset in the row of columns, whether inside the image) for the R S places
// of channel c that output place (h, w) sees.
template <class Body>
inline void for_each_place(const Im2col& p, int64_t h, int64_t w, Body body) {
  const int64_t top = h * p.stride[0] - p.padding[0], left = w * p.stride[1] - p.padding[1];
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t y = top + r * p.dilation[0];
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t x = left + s * p.dilation[1];
      const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
      body(y * p.image_strides[2] + x * p.image_strides[3], r * p.S + s, inside);
    }
  }
}

template <class C>
void gather(const Im2col& p, int64_t row) {
  const int64_t channels = p.C / p.G, places = p.R * p.S, I = channels * places;
  const int64_t padded = (I + kColumnPad - 1) / kColumnPad * kColumnPad, plane = p.out_H * p.out_W;
  const int64_t g = row / (p.B * plane), m = row % (p.B * plane), h = m % plane / p.out_W, w = m % p.out_W;
  const C* image = static_cast<const C*>(p.image) + m / plane * p.image_strides[0];
  C* columns = static_cast<C*>(p.columns) + row * padded;
  for (int64_t c = 0; c < channels; ++c) {
    const C* channel = image + (g * channels + c) * p.image_strides[1];
    C* to = columns + c * places;
    for_each_place(p, h, w, [&](int64_t at, int64_t i, bool inside) { to[i] = inside ? channel[at] : C(0); });
  }
  for (int64_t i = I; i < padded; ++i) columns[i] = 0;
}

template <class C>
void scatter(const Im2col& p, int64_t b, int64_t c) {
  const int64_t channels = p.C / p.G, places = p.R * p.S, I = channels * places;
  const int64_t padded = (I + kColumnPad - 1) / kColumnPad * kColumnPad, plane = p.out_H * p.out_W;
  C* channel = static_cast<C*>(p.image) + b * p.image_strides[0] + c * p.image_strides[1];
  for (int64_t y = 0; y < p.H; ++y)
    for (int64_t x = 0; x < p.W; ++x) channel[y * p.image_strides[2] + x * p.image_strides[3]] = 0;
  const C* from =
      static_cast<const C*>(p.columns) + (c / channels * p.B + b) * plane * padded + c % channels * places;
  for (int64_t m = 0; m < plane; ++m, from += padded)
    for_each_place(p, m / p.out_W, m % p.out_W, [&](int64_t at, int64_t i, bool inside) {
      if (inside) channel[at] += from[i];
    });
}

template <class F>
void with_compute_type(DType dtype, F f) {
  with_dtype(dtype, [&](auto t) { f(compute_t<decltype(t)>()); });
}

}  // namespace

namespace HYPERFAST_ISA {

void im2col(const Im2col& p, DType dtype, int threads) {
  with_compute_type(dtype, [&](auto t) {
#pragma omp parallel for num_threads(threads)
    for (int64_t row = 0; row < p.G * p.B * p.out_H * p.out_W; ++row) gather<decltype(t)>(p, row);
  });
}

void col2im(const Im2col& p, DType dtype, int threads) {
  with_compute_type(dtype, [&](auto t) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < p.B * p.C; ++i) scatter<decltype(t)>(p, i / p.C, i % p.C);
  });
}

}  // namespace HYPERFAST_ISA
}  // namespace hyperfast
