// hyperfast._cpu: the CPU kernels for Python. Tensors come as addresses; hyperfast/ops checks shapes, dtypes
// and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/generate_units.h"
#include "cpu/hyper_linear.h"
#include "cpu/kernels.h"
#include "cpu/lstm.h"
#include "cpu/lstm_backward.h"

namespace py = pybind11;
using namespace hyperfast;

namespace {

template <size_t Fields>
using Table = std::vector<std::array<int64_t, Fields>>;

template <class T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "bfloat16") return DType::bfloat16;
  throw py::value_error("dtype must be float32, float64 or bfloat16, got " + name);
}

void check_sizes(int64_t N, int64_t K, int threads) {
  if (N < 0 || K < 1 || K > kMaxK)
    throw py::value_error("need N >= 0 and 1 <= K <= " + std::to_string(kMaxK) + ", got N " +
                          std::to_string(N) + ", K " + std::to_string(K));
  if (threads < 1) throw py::value_error("threads must be at least 1");
}

int64_t element_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// The kernels read elements where elements may lie.
void check_aligned(int64_t address, int64_t size) {
  if (address % size)
    throw py::value_error("a tensor begins at an address that is no multiple of its elements' " +
                          std::to_string(size) + " bytes: clone() it");
}

void check_aligned(std::initializer_list<int64_t> addresses, int64_t size) {
  for (const int64_t address : addresses) check_aligned(address, size);
}

// Addresses come first in a row, then N and K.
template <size_t Fields>
void check_aligned(const Table<Fields>& table, DType dtype) {
  for (const auto& row : table)
    for (size_t f = 0; f + 2 < Fields; ++f) check_aligned(row[f], element_size(dtype));
}

void generate(const Table<6>& table, const std::string& dtype, int threads) {
  std::vector<GenerateSegment> segments;
  for (const auto& [weight, bias, z, w, N, K] : table) {
    check_sizes(N, K, threads);
    segments.push_back({pointer(weight), pointer(bias), pointer(z), pointer(w), N, K});
  }
  const DType type = dtype_of(dtype);
  check_aligned(table, type);
  py::gil_scoped_release release;
  kernels().generate(segments.data(), segments.size(), type, threads);
}

void generate_backward(const Table<6>& table, const std::string& dtype, int threads) {
  std::vector<GenerateBackwardSegment> segments;
  size_t scratch = 0;
  for (const auto& [weight, dw, dz, squared_norm, N, K] : table) {
    check_sizes(N, K, threads);
    segments.push_back({pointer(weight), pointer(dw), pointer(dz), pointer<double>(squared_norm), N, K});
    scratch += num_blocks(N, K) * (K + 1);
  }
  const DType type = dtype_of(dtype);
  check_aligned(table, type);
  py::gil_scoped_release release;
  std::vector<double> partials(scratch);
  kernels().generate_backward(segments.data(), segments.size(), type, partials.data(), threads);
}

Updated updated(int64_t values, const std::array<int64_t, 4>& states,
                const std::vector<double>& coefficients) {
  Updated made{
      pointer(values),
      {{pointer(states[0]), pointer<float>(states[1])}, {pointer(states[2]), pointer<float>(states[3])}},
      {}};
  if (coefficients.size() > made.coefficients.size()) throw py::value_error("too many coefficients");
  std::copy(coefficients.begin(), coefficients.end(), made.coefficients.begin());
  return made;
}

Rule rule_of(const std::string& name) {
  if (name == "adam") return Rule::adam;
  if (name == "sgd") return Rule::sgd;
  throw py::value_error("rule must be adam or sgd, got " + name);
}

Storage storage_of(const std::string& name) {
  if (name == "plain") return Storage::plain;
  if (name == "bfloat16") return Storage::bfloat16;
  if (name == "8bit") return Storage::eight_bit;
  throw py::value_error("storage must be plain, bfloat16 or 8bit, got " + name);
}

void update_generate(const Table<18>& table, const std::vector<std::vector<double>>& coefficients,
                     const std::vector<std::vector<double>>& bias_coefficients, const std::string& rule,
                     const std::string& storage, double grad_scale, const std::string& dtype, int threads) {
  if (table.size() != coefficients.size() || table.size() != bias_coefficients.size())
    throw py::value_error("one row of coefficients for each segment");
  std::vector<UpdateGenerateSegment> segments;
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& [weight, s0, c0, s1, c1, bias, bs0, bc0, bs1, bc1, dw, z, z_next, w, N, K, trained, seed] =
        table[i];
    check_sizes(N, K, threads);
    segments.push_back({updated(weight, {s0, c0, s1, c1}, coefficients[i]),
                        updated(bias, {bs0, bc0, bs1, bc1}, bias_coefficients[i]), trained != 0, pointer(dw),
                        pointer(z), pointer(z_next), pointer(w), N, K, uint32_t(seed)});
  }
  const DType type = dtype_of(dtype);
  const Rule kind = rule_of(rule);
  const Storage stored = storage_of(storage);
  if (stored != Storage::plain && type != DType::float32)
    throw py::value_error("states are stored as " + storage + " beside float32 weights only, got " + dtype);
  const int64_t size = element_size(type);
  const int64_t state_size = stored == Storage::plain ? size : stored == Storage::bfloat16 ? 2 : 1;
  for (const auto& row : table) {
    for (const int field : {0, 5, 10, 11, 12, 13}) check_aligned(row[field], size);
    for (const int field : {1, 3, 6, 8}) check_aligned(row[field], state_size);
    for (const int field : {2, 4, 7, 9}) check_aligned(row[field], sizeof(float));
  }
  py::gil_scoped_release release;
  kernels().update_generate(segments.data(), segments.size(), type, kind, stored, grad_scale, threads);
}

HyperLinearSizes sizes_of(const std::array<int64_t, 5>& sizes, int threads) {
  const auto& [G, M, O, I, K] = sizes;
  for (const int64_t size : {G, M, O, I})
    if (size < 1) throw py::value_error("sizes must be at least 1");
  check_sizes(G * O * I, K, threads);
  return {G, M, O, I, K};
}

size_t compute_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Uninitialised, beginning with a cache line.
constexpr std::align_val_t kLine{64};
struct FreeLines {
  void operator()(char* p) const { ::operator delete[](p, kLine); }
};
std::unique_ptr<char[], FreeLines> scratch_of(size_t bytes) {
  return std::unique_ptr<char[], FreeLines>(new (kLine) char[bytes]);
}

void hyper_linear(const std::array<int64_t, 6>& tensors, const std::array<int64_t, 5>& sizes,
                  const std::string& dtype, int threads) {
  const auto& [weight, bias, z, x, layer_bias, y] = tensors;
  const HyperLinear call{
      pointer(weight), pointer(bias),           pointer(z), pointer(x), pointer(layer_bias),
      pointer(y),      sizes_of(sizes, threads)};
  const DType type = dtype_of(dtype);
  check_aligned({weight, bias, z}, element_size(type));
  check_aligned({x, layer_bias, y}, compute_size(type));
  py::gil_scoped_release release;
  const auto scratch = scratch_of(forward_scratch(call.sizes, compute_size(type)));
  kernels().hyper_linear(call, type, scratch.get(), threads);
}

void hyper_linear_backward(const std::array<int64_t, 8>& tensors, const std::array<int64_t, 5>& sizes,
                           const std::string& dtype, int threads) {
  const auto& [weight, bias, z, x, dy, dx, dz, dw] = tensors;
  const HyperLinearBackward call{pointer(weight), pointer(bias), pointer(z),
                                 pointer(x),      pointer(dy),   pointer(dx),
                                 pointer(dz),     pointer(dw),   sizes_of(sizes, threads)};
  const DType type = dtype_of(dtype);
  check_aligned({weight, bias, z, dz, dw}, element_size(type));
  check_aligned({x, dy, dx}, compute_size(type));
  py::gil_scoped_release release;
  const auto scratch = scratch_of(backward_scratch(call.sizes, compute_size(type), call.dx));
  kernels().hyper_linear_backward(call, type, scratch.get(), threads);
}

// (P, D, C, O, I, T)
UnitSizes unit_sizes(const std::array<int64_t, 6>& sizes, bool channels_last,
                     const std::vector<UnitLayer>& layers, int threads) {
  const auto& [P, D, C, O, I, T] = sizes;
  for (const int64_t size : sizes)
    if (size < 1) throw py::value_error("sizes must be at least 1");
  const UnitSizes made{P, D, C, O, I, T, channels_last};
  int64_t units = 0;
  for (const auto& layer : layers) {
    if (layer.units < 0 || layer.across < 1 || layer.units % layer.across)
      throw py::value_error("a layer has whole rows of units");
    units += layer.units;
  }
  if (made.unit() % C || P * C != units * made.unit())
    throw py::value_error("P rows of C must be the layers' units");
  if (threads < 1) throw py::value_error("threads must be at least 1");
  return made;
}

// Layers hold dtype, or bfloat16 beside float32.
DType stored_of(const std::string& stored, DType dtype) {
  const DType type = dtype_of(stored);
  if (type != dtype && (type != DType::bfloat16 || dtype != DType::float32))
    throw py::value_error("layers hold the dtype of a, or bfloat16 beside float32, got " + stored);
  return type;
}

void generate_units(const Table<3>& table, const std::array<int64_t, 3>& tensors,
                    const std::array<int64_t, 6>& sizes, bool channels_last, const std::string& dtype,
                    const std::string& stored, int threads) {
  const DType type = dtype_of(dtype), layer_type = stored_of(stored, type);
  std::vector<UnitLayer> layers;
  for (const auto& [w, units, across] : table) {
    check_aligned(w, element_size(layer_type));
    layers.push_back({nullptr, pointer(w), units, across});
  }
  const auto& [a, weight, bias] = tensors;
  check_aligned({a, weight, bias}, element_size(type));
  const GenerateUnits call{layers.data(), int64_t(layers.size()),
                           pointer(a),    pointer(weight),
                           pointer(bias), unit_sizes(sizes, channels_last, layers, threads)};
  py::gil_scoped_release release;
  const auto scratch = scratch_of(units_scratch(call.sizes, type, false));
  kernels().generate_units(call, type, layer_type, scratch.get(), threads);
}

void generate_units_backward(const Table<4>& table, double l2, const std::array<int64_t, 5>& tensors,
                             const std::array<int64_t, 6>& sizes, bool channels_last,
                             const std::string& dtype, const std::string& stored, int threads) {
  const DType type = dtype_of(dtype), layer_type = stored_of(stored, type);
  std::vector<UnitLayer> layers;
  for (const auto& [dw, w, units, across] : table) {
    check_aligned({dw, w}, element_size(layer_type));
    if (l2 != 0 && !w) throw py::value_error("l2 needs the layers' w");
    layers.push_back({pointer(dw), pointer(w), units, across});
  }
  const auto& [a, weight, da, dweight, dbias] = tensors;
  check_aligned({a, weight, da, dweight, dbias}, element_size(type));
  const GenerateUnitsBackward call{layers.data(),
                                   int64_t(layers.size()),
                                   pointer(a),
                                   pointer(weight),
                                   pointer(da),
                                   pointer(dweight),
                                   pointer(dbias),
                                   l2,
                                   unit_sizes(sizes, channels_last, layers, threads)};
  py::gil_scoped_release release;
  const auto scratch = scratch_of(units_scratch(call.sizes, type, true));
  kernels().generate_units_backward(call, type, layer_type, scratch.get(), threads);
}

OuterProductSizes outer_sizes_of(const std::array<int64_t, 4>& sizes, int threads) {
  const auto& [B, T, I, K] = sizes;
  for (const int64_t size : {B, T, I})
    if (size < 1) throw py::value_error("sizes must be at least 1");
  check_sizes(I, K, threads);
  return {B, T, I, K};
}

void outer_product(const std::array<int64_t, 3>& tensors, const std::array<int64_t, 4>& sizes,
                   const std::string& dtype, int threads) {
  const auto& [x, z, products] = tensors;
  const OuterProduct call{pointer(x), pointer(z), pointer(products), outer_sizes_of(sizes, threads)};
  const DType type = dtype_of(dtype);
  check_aligned({x, z, products}, element_size(type));
  py::gil_scoped_release release;
  kernels().outer_product(call, type, threads);
}

void outer_product_backward(const std::array<int64_t, 5>& tensors, bool add,
                            const std::array<int64_t, 4>& sizes, const std::string& dtype, int threads) {
  const auto& [dproducts, x, z, dx, dz] = tensors;
  const OuterProductBackward call{pointer(dproducts),
                                  pointer(x),
                                  pointer(z),
                                  pointer(dx),
                                  pointer(dz),
                                  add,
                                  outer_sizes_of(sizes, threads)};
  const DType type = dtype_of(dtype);
  check_aligned({dproducts, x, z, dx, dz}, element_size(type));
  py::gil_scoped_release release;
  kernels().outer_product_backward(call, type, threads);
}

using Pair = std::array<int64_t, 2>;

template <auto kernel>
void columns(int64_t image, const std::array<int64_t, 4>& shape, const std::array<int64_t, 4>& strides,
             int64_t columns, const Pair& kernel_size, const Pair& out, const Pair& stride,
             const Pair& padding, const Pair& dilation, int64_t groups, const std::string& dtype,
             int threads) {
  Im2col p{pointer(image),
           pointer(columns),
           shape[0],
           shape[1],
           shape[2],
           shape[3],
           kernel_size[0],
           kernel_size[1],
           out[0],
           out[1],
           groups,
           {},
           {},
           {},
           {}};
  for (int i = 0; i < 2; ++i) p.stride[i] = stride[i], p.padding[i] = padding[i], p.dilation[i] = dilation[i];
  for (int i = 0; i < 4; ++i) p.image_strides[i] = strides[i];
  const DType type = dtype_of(dtype);
  check_aligned({image, columns}, element_size(type));
  py::gil_scoped_release release;
  (kernels().*kernel)(p, type, threads);
}

PooledImages images_of(const std::array<int64_t, 5>& sizes, int threads) {
  const auto [B, H, W, C, P] = sizes;
  if (B < 1 || C < 1 || P < 1 || P > 2 || H < P || W < P || threads < 1)
    throw py::value_error("need B, C, threads >= 1, P 1 or 2, H and W >= P");
  return {B, H, W, C, P};
}

// running += momentum (batch - running), rounded as torch.lerp does
template <class T>
void lerp(T* running, const void* batch, int64_t C, double momentum) {
  using A = compute_t<T>;
  const A *made = static_cast<const A*>(batch), w = A(momentum);
  for (int64_t c = 0; c < C; ++c) {
    const A before = widen(running[c]), delta = made[c] - before;
    running[c] = narrow<T>(w < A(0.5) ? before + w * delta : made[c] - delta * (1 - w));
  }
}

void batch_norm(const std::array<int64_t, 5>& sizes, int64_t x, int64_t weight, int64_t bias,
                int64_t residual, int64_t statistics, bool given, double eps, int64_t y, int64_t index,
                const std::array<int64_t, 3>& running, double momentum, const std::string& stored,
                const std::string& dtype, int threads) {
  const PooledImages images = images_of(sizes, threads);
  if (residual && images.P != 1) throw py::value_error("a residual needs P 1");
  double* mean = pointer<double>(statistics);
  const std::unique_ptr<double[]> scratch(new double[images.scratch() + 2 * images.C]);
  double* batch = given ? nullptr : scratch.get() + images.scratch();
  const BatchNormSegment segment{
      images, pointer(x), pointer(weight), pointer(bias),          pointer(residual), mean, mean + images.C,
      batch,  eps,        pointer(y),      pointer<uint8_t>(index)};
  const DType type = dtype_of(dtype), running_type = dtype_of(stored);
  const int64_t running_mean = running[0], running_var = running[1], count = running[2];
  if (running_mean && (given || compute_size(running_type) != compute_size(type)))
    throw py::value_error("running statistics need those of x, and a dtype computed like x");
  check_aligned({x, y, residual}, element_size(type));
  check_aligned({weight, bias}, compute_size(type));
  check_aligned({running_mean, running_var}, element_size(running_type));
  check_aligned(count, sizeof(int64_t));
  py::gil_scoped_release release;
  kernels().batch_norm(segment, type, scratch.get(), threads);
  const void* variance = static_cast<char*>(segment.batch) + images.C * compute_size(type);
  if (running_mean)
    with_dtype(running_type, [&](auto t) {
      lerp(pointer<decltype(t)>(running_mean), segment.batch, images.C, momentum);
      lerp(pointer<decltype(t)>(running_var), variance, images.C, momentum);
    });
  if (count) ++*pointer<int64_t>(count);
}

void batch_norm_backward(const std::array<int64_t, 5>& sizes, int64_t x, int64_t dy, int64_t index,
                         int64_t weight, int64_t statistics, bool given, double eps, int64_t dx,
                         int64_t dresidual, int64_t dweight, int64_t dbias, const std::string& dtype,
                         int threads) {
  const PooledImages images = images_of(sizes, threads);
  if (dresidual && (images.P != 1 || !dx)) throw py::value_error("a residual needs P 1 and dx");
  const double* mean = pointer<double>(statistics);
  const BatchNormBackwardSegment segment{images,
                                         pointer(x),
                                         pointer(dy),
                                         pointer<uint8_t>(index),
                                         pointer(weight),
                                         mean,
                                         mean + images.C,
                                         given,
                                         eps,
                                         pointer(dx),
                                         pointer(dresidual),
                                         pointer(dweight),
                                         pointer(dbias)};
  const DType type = dtype_of(dtype);
  check_aligned({x, dy, dx, dresidual}, element_size(type));
  check_aligned({weight, dweight, dbias}, compute_size(type));
  py::gil_scoped_release release;
  const std::unique_ptr<double[]> scratch(new double[images.scratch()]);
  kernels().batch_norm_backward(segment, type, scratch.get(), threads);
}

// What lstm and lstm_backward take alike.
LstmSizes lstm_sizes(const std::array<int64_t, 6>& sizes, int64_t batch_sizes, int threads) {
  const auto [T, N, B, H, M, Z] = sizes;
  if (T < 0 || N < 0 || B < 0 || H < 1 || M < 0 || Z < 0 || (M == 0) != (Z == 0) || threads < 1)
    throw py::value_error("need T, N, B >= 0, H, threads >= 1, M and Z both >= 1 or both 0");
  const LstmSizes made{T, N, B, H, M, Z, pointer<int64_t>(batch_sizes)};
  int64_t rows = 0, before = B;
  for (int64_t t = 0; t < T; ++t) {
    if (made.batch_sizes[t] < 1 || made.batch_sizes[t] > before)
      throw py::value_error("batch_sizes fall from B and are at least 1");
    rows += before = made.batch_sizes[t];
  }
  if (rows != N) throw py::value_error("batch_sizes count N rows");
  return made;
}

LstmWeights lstm_weights(const std::array<int64_t, 15>& w) {
  const auto norms = [&](int i) {
    return LstmNorms{pointer(w[i]), pointer(w[i + 1]), pointer(w[i + 2]), pointer(w[i + 3])};
  };
  return {pointer(w[0]), pointer(w[1]), pointer(w[2]), pointer(w[3]), pointer(w[4]),
          pointer(w[5]), pointer(w[6]), norms(7),      norms(11)};
}

DType lstm_dtype(const std::string& dtype) {
  const DType type = dtype_of(dtype);
  if (type == DType::bfloat16) throw py::value_error("dtype must be float32 or float64");
  return type;
}

// Addresses of LstmPacked's parts and of the scratch.
using LstmMemory = std::array<int64_t, 3>;

LstmMemory lstm_memory(const std::array<int64_t, 6>& sizes, bool backward, bool whole,
                       const std::string& dtype, int threads) {
  const auto [T, N, B, H, M, Z] = sizes;
  const LstmSizes s{T, N, B, H, M, Z, nullptr};
  const DType type = lstm_dtype(dtype);
  const LstmPackedBytes packed =
      backward ? lstm_backward_packed_bytes(s, type) : lstm_packed_bytes(s, element_size(type));
  return {packed.weights, packed.scales,
          backward ? lstm_backward_scratch(s, whole, type, threads) : lstm_scratch(s, whole, type, threads)};
}

void lstm_pack(const std::array<int64_t, 6>& sizes, const std::array<int64_t, 15>& weights, bool backward,
               const LstmMemory& memory, const std::string& dtype, int threads) {
  const auto [T, N, B, H, M, Z] = sizes;
  const LstmSizes s{T, N, B, H, M, Z, nullptr};
  const DType type = lstm_dtype(dtype);
  for (const int64_t address : weights) check_aligned(address, element_size(type));
  for (const int64_t address : memory) check_aligned(address, int64_t(kLine));
  const auto pack = backward ? kernels().lstm_backward_pack : kernels().lstm_pack;
  const LstmWeights given = lstm_weights(weights);
  py::gil_scoped_release release;
  pack(s, given, pointer(memory[0]), pointer(memory[1]), type, threads);
}

void lstm(const std::array<int64_t, 6>& sizes, int64_t batch_sizes, const std::array<int64_t, 15>& weights,
          const LstmMemory& memory, int64_t key, double dropout, int64_t first_row, double eps,
          const std::array<int64_t, 12>& tensors, const std::string& dtype, int threads) {
  const auto& [x_gates, hyper_x_gates, h0, c0, hyper_h0, hyper_c0, h, c, hyper_h, hyper_c, h_gates,
               hyper_gates] = tensors;
  const Lstm call{lstm_sizes(sizes, batch_sizes, threads),
                  lstm_weights(weights),
                  {pointer(memory[0]), pointer(memory[1])},
                  {pointer<int64_t>(key), dropout, first_row},
                  eps,
                  pointer(x_gates),
                  pointer(hyper_x_gates),
                  pointer(h0),
                  pointer(c0),
                  pointer(hyper_h0),
                  pointer(hyper_c0),
                  pointer(h),
                  pointer(c),
                  pointer(hyper_h),
                  pointer(hyper_c),
                  pointer(h_gates),
                  pointer(hyper_gates)};
  const DType type = lstm_dtype(dtype);
  for (const int64_t address : weights) check_aligned(address, element_size(type));
  for (const int64_t address : tensors) check_aligned(address, element_size(type));
  for (const int64_t address : memory) check_aligned(address, int64_t(kLine));
  py::gil_scoped_release release;
  kernels().lstm(call, type, pointer(memory[2]), lstm_threads(call.sizes, threads));
}

void lstm_backward(const std::array<int64_t, 6>& sizes, int64_t batch_sizes,
                   const std::array<int64_t, 15>& weights, const LstmMemory& memory, int64_t key,
                   double dropout, int64_t first_row, double eps, const std::array<int64_t, 13>& inputs,
                   const std::array<int64_t, 18>& outputs, const std::string& dtype, int threads) {
  const auto& [x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z, dh, dh_last, dc_last,
               dhyper_h_last, dhyper_c_last] = inputs;
  const auto norms = [&](int i) {
    return std::array<void*, 4>{pointer(outputs[i]), pointer(outputs[i + 1]), pointer(outputs[i + 2]),
                                pointer(outputs[i + 3])};
  };
  LstmBackward call{lstm_sizes(sizes, batch_sizes, threads),
                    lstm_weights(weights),
                    {pointer(memory[0]), pointer(memory[1])},
                    {pointer<int64_t>(key), dropout, first_row},
                    eps,
                    pointer(x_gates),
                    pointer(c0),
                    pointer(hyper_c0),
                    pointer(c),
                    pointer(hyper_c),
                    pointer(h_gates),
                    pointer(hyper_gates),
                    pointer(z),
                    pointer(dh),
                    pointer(dh_last),
                    pointer(dc_last),
                    pointer(dhyper_h_last),
                    pointer(dhyper_c_last),
                    pointer(outputs[0]),
                    pointer(outputs[1]),
                    pointer(outputs[2]),
                    pointer(outputs[3]),
                    pointer(outputs[4]),
                    pointer(outputs[5]),
                    pointer(outputs[6]),
                    pointer(outputs[7]),
                    pointer(outputs[8]),
                    pointer(outputs[9]),
                    norms(10),
                    norms(14)};
  const DType type = lstm_dtype(dtype);
  for (const int64_t address : weights) check_aligned(address, element_size(type));
  for (const int64_t address : inputs) check_aligned(address, element_size(type));
  for (const int64_t address : outputs) check_aligned(address, element_size(type));
  for (const int64_t address : memory) check_aligned(address, int64_t(kLine));
  py::gil_scoped_release release;
  kernels().lstm_backward(call, type, pointer(memory[2]), lstm_threads(call.sizes, threads));
}

std::vector<std::string> isas() {
  const Kernels* found[8];
  const int count = supported(found, 8);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(found[i]->isa);
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of hyperfast over plain addresses; use hyperfast.ops.";
  m.def("isa", [] { return std::string(kernels().isa); }, "Instruction set in use.");
  m.def("isas", &isas, "Instruction sets built and supported by this processor, the preferred one last.");
  m.def("generate", &generate, py::arg("segments"), py::arg("dtype"), py::arg("threads"),
        "segments: (weight, bias or 0, z, w, N, K) each.");
  m.def("generate_backward", &generate_backward, py::arg("segments"), py::arg("dtype"), py::arg("threads"),
        "segments: (weight, dw, dz, squared_norm, N, K) each; squared_norm addresses one float64.");
  m.def("update_generate", &update_generate, py::arg("segments"), py::arg("coefficients"),
        py::arg("bias_coefficients"), py::arg("rule"), py::arg("storage"), py::arg("grad_scale"),
        py::arg("dtype"), py::arg("threads"),
        "segments: (weight, state, scales, second state, scales, bias, its four, dw, z, z_next, w, N, K, "
        "whether bias is trained, seed) each, 0 for what is not there; coefficients of weight and of bias: a "
        "row each in the order of hyperfast.reference.");
  m.def("hyper_linear", &hyper_linear, py::arg("tensors"), py::arg("sizes"), py::arg("dtype"),
        py::arg("threads"),
        "tensors: (weight, bias or 0, z, x, layer_bias or 0, y); sizes: (G, M, O, I, K).");
  m.def("hyper_linear_backward", &hyper_linear_backward, py::arg("tensors"), py::arg("sizes"),
        py::arg("dtype"), py::arg("threads"),
        "tensors: (weight, bias or 0, z, x, dy, dx or 0, dz or 0, dw or 0); sizes: (G, M, O, I, K).");
  m.def(
      "generate_units", &generate_units, py::arg("layers"), py::arg("tensors"), py::arg("sizes"),
      py::arg("channels_last"), py::arg("dtype"), py::arg("stored"), py::arg("threads"),
      "layers: (w, units, units side by side) each; tensors: (a, weight, bias or 0); sizes: (P, D, C, O, I, "
      "T); stored: dtype of the layers.");
  m.def("generate_units_backward", &generate_units_backward, py::arg("layers"), py::arg("l2"),
        py::arg("tensors"), py::arg("sizes"), py::arg("channels_last"), py::arg("dtype"), py::arg("stored"),
        py::arg("threads"),
        "layers: (dw or 0, w or 0, units, units side by side) each; tensors: (a, weight, da or 0, dweight or "
        "0, dbias or 0); the rest as in generate_units.");
  m.def("outer_product", &outer_product, py::arg("tensors"), py::arg("sizes"), py::arg("dtype"),
        py::arg("threads"), "tensors: (x, z, products); sizes: (B, T, I, K).");
  m.def("outer_product_backward", &outer_product_backward, py::arg("tensors"), py::arg("add"),
        py::arg("sizes"), py::arg("dtype"), py::arg("threads"),
        "tensors: (dproducts, x, z, dx or 0, dz or 0); add: whether to dx; sizes: (B, T, I, K).");
  const auto def_columns = [&](const char* name, auto function, const char* doc) {
    m.def(name, function, py::arg("image"), py::arg("shape"), py::arg("strides"), py::arg("columns"),
          py::arg("kernel_size"), py::arg("out"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
          py::arg("groups"), py::arg("dtype"), py::arg("threads"), doc);
  };
  def_columns("im2col", &columns<&Kernels::im2col>, "Writes the columns of a convolution.");
  def_columns("col2im", &columns<&Kernels::col2im>, "Adds columns up to an image, which is overwritten.");
  m.def("lstm_memory", &lstm_memory, py::arg("sizes"), py::arg("backward"), py::arg("whole"),
        py::arg("dtype"), py::arg("threads"),
        "Bytes (of packed weights, of packed scales, of scratch) for a sequence of these sizes, (T, N, B, H, "
        "M, Z), and any part of it; 0 where nothing is packed. whole: the gates are kept (forward), there "
        "are norms (backward).");
  m.def("lstm_pack", &lstm_pack, py::arg("sizes"), py::arg("weights"), py::arg("backward"), py::arg("memory"),
        py::arg("dtype"), py::arg("threads"),
        "Packs the weights into memory, addresses as lstm_memory counts them, for all parts of a sequence.");
  m.def("lstm", &lstm, py::arg("sizes"), py::arg("batch_sizes"), py::arg("weights"), py::arg("memory"),
        py::arg("key"), py::arg("dropout"), py::arg("first_row"), py::arg("eps"), py::arg("tensors"),
        py::arg("dtype"), py::arg("threads"),
        "sizes: (T, N, B, H, M, Z); batch_sizes: int64 [T]; weights: (weight_hh, bias, hyper_weight_xh, "
        "hyper_weight_hh, z_weight, z_bias, d_weight, four of norms, four of hyper_norms); memory: packed by "
        "lstm_pack; key: int64 [1] or 0; first_row: the first row's number for dropout; tensors: (x_gates, "
        "hyper_x_gates, h0, c0, hyper_h0, hyper_c0, h, c, hyper_h, hyper_c, h_gates, hyper_gates), the last "
        "two both or neither; 0 for what is not there.");
  m.def("lstm_backward", &lstm_backward, py::arg("sizes"), py::arg("batch_sizes"), py::arg("weights"),
        py::arg("memory"), py::arg("key"), py::arg("dropout"), py::arg("first_row"), py::arg("eps"),
        py::arg("inputs"), py::arg("outputs"), py::arg("dtype"), py::arg("threads"),
        "As lstm; inputs: (x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z, dh, dh_last, dc_last, "
        "dhyper_h_last, dhyper_c_last), the last five may be 0; outputs: (dx_gates, dh_gates, dhyper_gates, "
        "dz, "
        "dh0, dc0, dhyper_h0, dhyper_c0, dbias, dd_weight, four of dnorms, four of dhyper_norms).");
  m.def("batch_norm", &batch_norm, py::arg("sizes"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("residual"), py::arg("statistics"), py::arg("given"), py::arg("eps"), py::arg("y"),
        py::arg("index"), py::arg("running"), py::arg("momentum"), py::arg("stored"), py::arg("dtype"),
        py::arg("threads"),
        "sizes: (B, H, W, C, P); addresses; statistics: mean [C] and var [C], float64, written unless given; "
        "running: mean and var [C] of dtype `stored` and count, one int64, updated; weight, bias, residual "
        "(P 1 "
        "only), index and those of running may be 0.");
  m.def("batch_norm_backward", &batch_norm_backward, py::arg("sizes"), py::arg("x"), py::arg("dy"),
        py::arg("index"), py::arg("weight"), py::arg("statistics"), py::arg("given"), py::arg("eps"),
        py::arg("dx"), py::arg("dresidual"), py::arg("dweight"), py::arg("dbias"), py::arg("dtype"),
        py::arg("threads"), "As batch_norm; dx and dresidual may be 0.");
}
