// hyperfast._cuda: the CUDA kernels over plain integers. Checks what a kernel cannot; shapes and devices of
// tensors are the caller's to check, and the tensors' device must be the current one.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace hyperfast;  // lstm_arguments.h
using namespace hyperfast::cuda;

namespace {

// Addresses first, then sizes.
template <size_t Fields>
using Rows = std::vector<std::array<int64_t, Fields>>;

template <class T = void>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

struct DTypeInfo {
  DType dtype;
  int64_t bytes;
};

template <class Value>
Value named(const char* what, const std::map<std::string, Value>& known, const std::string& name) {
  const auto found = known.find(name);
  if (found != known.end()) return found->second;
  std::string wanted;
  for (const auto& entry : known) wanted += (wanted.empty() ? "" : ", ") + entry.first;
  throw py::value_error(std::string(what) + " is '" + name + "'; wanted one of " + wanted);
}

DTypeInfo dtype_info(const std::string& name) {
  return named<DTypeInfo>("dtype",
                          {{"float32", {DType::f32, 4}},
                           {"float64", {DType::f64, 8}},
                           {"float16", {DType::f16, 2}},
                           {"bfloat16", {DType::bf16, 2}}},
                          name);
}

std::string at(size_t i) { return "segments[" + std::to_string(i) + "]: "; }

void check_sizes(const std::string& where, int64_t N, int64_t K) {
  if (N < 0) throw py::value_error(where + "N is " + std::to_string(N) + "; wanted N >= 0");
  if (K < 1 || K > kMaxK)
    throw py::value_error(where + "K is " + std::to_string(K) + "; wanted 1 to " + std::to_string(kMaxK));
}

void check_present(const std::string& where, const char* names, std::initializer_list<int64_t> addresses) {
  for (const int64_t address : addresses)
    if (!address) throw py::value_error(where + names + " must not be null");
}

void check_aligned(const std::string& where, std::initializer_list<int64_t> addresses, int64_t bytes) {
  for (const int64_t address : addresses)
    if (address % bytes)
      throw py::value_error(where + "a tensor begins at an address that is no multiple of its elements' " +
                            std::to_string(bytes) + " bytes: clone() it");
}

void check_done(const char* op, const char* error) {
  if (error) throw std::runtime_error("hyperfast._cuda." + std::string(op) + ": " + error);
}

void generate_binding(const Rows<6>& segments, const std::string& dtype, uintptr_t stream) {
  const DTypeInfo info = dtype_info(dtype);
  std::vector<GenerateSegment> table;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto [weight, bias, z, out, N, K] = segments[i];
    check_sizes(at(i), N, K);
    if (N == 0) continue;
    check_present(at(i), "weight, z and out", {weight, z, out});
    check_aligned(at(i), {weight, bias, z, out}, info.bytes);
    table.push_back({pointer(weight), pointer(bias), pointer(z), pointer(out), N, static_cast<int>(K)});
  }
  check_done("generate", generate(table.data(), table.size(), info.dtype, stream));
}

int64_t generate_backward_scratch_binding(const Rows<2>& sizes) {
  int64_t doubles = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto [N, K] = sizes[i];
    check_sizes(at(i), N, K);
    doubles += generate_backward_scratch(N, static_cast<int>(K));
  }
  return doubles;
}

void generate_backward_binding(const Rows<6>& segments, int64_t scratch, const std::string& dtype,
                               uintptr_t stream) {
  const DTypeInfo info = dtype_info(dtype);
  std::vector<GenerateBackwardSegment> table;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto [weight, dw, dz, squared_norm, N, K] = segments[i];
    check_sizes(at(i), N, K);
    check_present(at(i), "dz and squared_norm", {dz, squared_norm});
    if (N > 0) check_present(at(i), "weight, dw and scratch", {weight, dw, scratch});
    check_aligned(at(i), {weight, dw, dz}, info.bytes);
    check_aligned(at(i), {squared_norm, scratch}, sizeof(double));
    table.push_back(
        {pointer(weight), pointer(dw), pointer(dz), pointer<double>(squared_norm), N, static_cast<int>(K)});
  }
  check_done("generate_backward",
             generate_backward(table.data(), table.size(), pointer<double>(scratch), info.dtype, stream));
}

Updated updated(int64_t values, const std::array<int64_t, 4>& states) {
  return {pointer(values),
          {pointer(states[0]), pointer(states[2])},
          {pointer<float>(states[1]), pointer<float>(states[3])}};
}

// The states (address, scales, address, scales) of what is updated: as many as the rule has, scales in 8
// bits.
void check_states(const std::string& where, const std::array<int64_t, 4>& states, int count, Storage storage,
                  int64_t bytes) {
  for (int j = 0; j < count; ++j) {
    check_present(where, "states", {states[2 * j]});
    if (storage == Storage::eight_bit) check_present(where, "scales", {states[2 * j + 1]});
    check_aligned(where, {states[2 * j]}, bytes);
    check_aligned(where, {states[2 * j + 1]}, sizeof(float));
  }
}

void update_generate_binding(const Rows<17>& segments, int64_t coefficients, int64_t bias_coefficients,
                             const std::string& rule, const std::string& storage, int64_t grad_scale,
                             int64_t seeds, int64_t skip, const std::string& dtype, uintptr_t stream) {
  const DTypeInfo info = dtype_info(dtype);
  const Rule kind = named<Rule>("rule", {{"adam", Rule::adam}, {"sgd", Rule::sgd}}, rule);
  const Storage stored = named<Storage>(
      "storage", {{"plain", Storage::plain}, {"bfloat16", Storage::bfloat16}, {"8bit", Storage::eight_bit}},
      storage);
  if (stored != Storage::plain && info.dtype != DType::f32)
    throw py::value_error("states are stored as " + storage + " beside float32 weights only, got " + dtype);
  const int64_t state_bytes = stored == Storage::plain ? info.bytes : stored == Storage::bfloat16 ? 2 : 1;
  bool with_states = kind == Rule::adam || stored != Storage::plain;
  for (const auto& segment : segments) with_states = with_states || segment[1];
  const int states = kind == Rule::adam ? 2 : with_states ? 1 : 0;
  check_present("", "coefficients, bias_coefficients, grad_scale and seeds",
                {coefficients, bias_coefficients, grad_scale, seeds});
  check_aligned("", {coefficients, bias_coefficients, grad_scale, seeds}, 8);
  check_aligned("", {skip}, sizeof(float));
  std::vector<UpdateGenerateSegment> table;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto [weight, s0, c0, s1, c1, bias, bs0, bc0, bs1, bc1, dw, z, z_next, w, N, K, trained] =
        segments[i];
    check_sizes(at(i), N, K);
    if (N == 0) continue;
    const std::array<int64_t, 4> of_weight{s0, c0, s1, c1}, of_bias{bs0, bc0, bs1, bc1};
    check_present(at(i), "weight, dw, z, new_z and w", {weight, dw, z, z_next, w});
    check_aligned(at(i), {weight, bias, dw, z, z_next, w}, info.bytes);
    check_states(at(i), of_weight, states, stored, state_bytes);
    if (trained) check_present(at(i), "a trained bias", {bias});
    if (trained) check_states(at(i), of_bias, states, stored, state_bytes);
    table.push_back({updated(weight, of_weight), updated(bias, of_bias), pointer(dw), pointer(z),
                     pointer(z_next), pointer(w), N, static_cast<int>(K), static_cast<int>(i), trained != 0});
  }
  const UpdateGenerateNumbers numbers{pointer<double>(coefficients), pointer<double>(bias_coefficients),
                                      pointer<double>(grad_scale), pointer<int64_t>(seeds),
                                      pointer<float>(skip)};
  check_done("update_generate", update_generate(table.data(), table.size(), numbers, kind, with_states,
                                                stored, info.dtype, stream));
}

void check_linear(int64_t M, int64_t O, int64_t I, int64_t K) {
  if (M < 1 || M > kMaxRows)
    throw py::value_error("M is " + std::to_string(M) + "; wanted 1 to " + std::to_string(kMaxRows));
  for (const int64_t size : {O, I})
    if (size < 1 || size > INT32_MAX) throw py::value_error("O and I must be 1 to 2^31 - 1");
  check_sizes("", O * I, K);
}

DTypeInfo linear_dtype_info(const std::string& name) {
  const DTypeInfo info = dtype_info(name);
  if (info.dtype == DType::f64)
    throw py::value_error("dtype is 'float64'; wanted float32, float16 or bfloat16");
  return info;
}

using LinearSizes = std::array<int64_t, 4>;

int64_t hyper_linear_scratch_binding(const LinearSizes& sizes, const std::string& dtype) {
  const auto [M, O, I, K] = sizes;
  check_linear(M, O, I, K);
  return hyper_linear_scratch(M, O, I, static_cast<int>(K), linear_dtype_info(dtype).dtype);
}

void hyper_linear_binding(const std::array<int64_t, 7>& tensors, const LinearSizes& sizes,
                          const std::string& dtype, uintptr_t stream) {
  const auto [weight, bias, z, x, layer_bias, y, scratch] = tensors;
  const auto [M, O, I, K] = sizes;
  const DTypeInfo info = linear_dtype_info(dtype);
  check_linear(M, O, I, K);
  check_present("", "weight, z, x and y", {weight, z, x, y});
  if (hyper_linear_scratch(M, O, I, static_cast<int>(K), info.dtype)) check_present("", "scratch", {scratch});
  check_aligned("", {weight, bias, z, x, layer_bias, y}, info.bytes);
  check_aligned("", {scratch}, sizeof(float));
  const HyperLinear call{
      pointer(weight),    pointer(bias),           pointer(z), pointer(x), pointer(layer_bias),
      pointer(y),         pointer<float>(scratch), M,          O,          I,
      static_cast<int>(K)};
  check_done("hyper_linear", hyper_linear(call, info.dtype, stream));
}

using LstmSizeNumbers = std::array<int64_t, 6>;  // T, N, B, H, M, Z
using LstmWeightAddresses = std::array<int64_t, 15>;

LstmSizes lstm_sizes(const LstmSizeNumbers& sizes, int64_t batch_sizes) {
  const auto [T, N, B, H, M, Z] = sizes;
  if (T < 1 || N < 1 || B < 1 || H < 1) throw py::value_error("T, N, B and H must be at least 1");
  if (M < 0 || Z < 0 || (M == 0) != (Z == 0))
    throw py::value_error("M and Z must be at least 1, or both 0 without a hyper LSTM");
  if (T > INT32_MAX) throw py::value_error("T must be at most 2^31 - 1");
  check_present("", "batch_sizes", {batch_sizes});
  check_aligned("", {batch_sizes}, sizeof(int64_t));
  const int64_t* steps = pointer<int64_t>(batch_sizes);
  int64_t sum = 0;
  for (int64_t t = 0; t < T; ++t) {
    if (steps[t] < 1 || steps[t] > (t ? steps[t - 1] : B))
      throw py::value_error("batch_sizes must be at least 1, at most B, and never rise");
    sum += steps[t];
  }
  if (sum != N || steps[0] != B) throw py::value_error("batch_sizes must begin with B and sum to N");
  return {T, N, B, H, M, Z, steps};
}

// Those of an LSTM: all there, or all null.
void check_together(const char* names, std::initializer_list<int64_t> addresses, bool there) {
  for (const int64_t address : addresses)
    if ((address != 0) != there)
      throw py::value_error(std::string(names) +
                            (there ? " must not be null" : " must be null without them"));
}

LstmNorms lstm_norms(const char* names, const int64_t* addresses) {
  const auto [a, b, c, d] = std::array<int64_t, 4>{addresses[0], addresses[1], addresses[2], addresses[3]};
  check_together(names, {a, b, c, d}, a != 0);
  check_aligned("", {a, b, c, d}, sizeof(float));
  return {pointer(a), pointer(b), pointer(c), pointer(d)};
}

LstmWeights lstm_weights(const LstmWeightAddresses& w, bool hyper, int64_t bytes) {
  check_present("", "weight_hh and bias", {w[0], w[1]});
  check_together("hyper_weight_xh to d_weight", {w[2], w[3], w[4], w[5], w[6]}, hyper);
  if (!hyper) check_together("norms of a hyper LSTM", {w[11], w[12], w[13], w[14]}, false);
  for (int i = 0; i < 7; ++i) check_aligned("", {w[i]}, bytes);
  return {pointer(w[0]),
          pointer(w[1]),
          pointer(w[2]),
          pointer(w[3]),
          pointer(w[4]),
          pointer(w[5]),
          pointer(w[6]),
          lstm_norms("norms", &w[7]),
          lstm_norms("hyper norms", &w[11])};
}

LstmDropout lstm_dropout(int64_t key, double dropout) {
  if (!(dropout >= 0 && dropout < 1)) throw py::value_error("dropout must be at least 0 and below 1");
  if ((key != 0) != (dropout > 0)) throw py::value_error("key and dropout come together");
  check_aligned("", {key}, sizeof(int64_t));
  return {pointer<int64_t>(key), dropout, 0};
}

// What both kernels take last; refusals of theirs are errors here.
void check_lstm(const char* op, const LstmSizes& sizes, const DTypeInfo& info, bool backward,
                int64_t scratch) {
  if (const char* refused = lstm_refuses(sizes, info.dtype, backward))
    throw py::value_error(std::string(op) + " is not served: " + refused);
  check_present("", "scratch", {scratch});
  check_aligned("", {scratch}, 16);
}

std::string lstm_refuses_binding(const LstmSizeNumbers& sizes, int64_t batch_sizes, const std::string& dtype,
                                 bool backward) {
  const char* refused = lstm_refuses(lstm_sizes(sizes, batch_sizes), dtype_info(dtype).dtype, backward);
  return refused ? refused : "";
}

int64_t lstm_scratch_binding(const LstmSizeNumbers& sizes, int64_t batch_sizes, const std::string& dtype,
                             bool backward) {
  return lstm_scratch(lstm_sizes(sizes, batch_sizes), dtype_info(dtype).dtype, backward);
}

void lstm_binding(const LstmSizeNumbers& numbers, int64_t batch_sizes, const LstmWeightAddresses& weights,
                  int64_t key, double dropout, double eps, const std::array<int64_t, 12>& tensors,
                  int64_t scratch, const std::string& dtype, uintptr_t stream) {
  const DTypeInfo info = dtype_info(dtype);
  const LstmSizes sizes = lstm_sizes(numbers, batch_sizes);
  const bool hyper = sizes.M > 0;
  const auto [x, hyper_x, h0, c0, hyper_h0, hyper_c0, h, c, hyper_h, hyper_c, h_gates, hyper_gates] = tensors;
  check_present("", "x_gates, h0, c0, h and c", {x, h0, c0, h, c});
  check_together("hyper tensors", {hyper_x, hyper_h0, hyper_c0, hyper_h, hyper_c}, hyper);
  if (!hyper) check_together("hyper tensors", {hyper_gates}, false);
  check_aligned("", {x, hyper_x, h0, hyper_h0, h, hyper_h, h_gates, hyper_gates}, info.bytes);
  check_aligned("", {c0, hyper_c0, c, hyper_c}, sizeof(float));
  check_lstm("lstm", sizes, info, false, scratch);
  const Lstm call{sizes,
                  lstm_weights(weights, hyper, info.bytes),
                  lstm_dropout(key, dropout),
                  eps,
                  pointer(x),
                  pointer(hyper_x),
                  pointer(h0),
                  pointer(c0),
                  pointer(hyper_h0),
                  pointer(hyper_c0),
                  pointer(h),
                  pointer(c),
                  pointer(hyper_h),
                  pointer(hyper_c),
                  pointer(h_gates),
                  pointer(hyper_gates),
                  pointer<float>(scratch)};
  check_done("lstm", lstm(call, info.dtype, stream));
}

void lstm_backward_binding(const LstmSizeNumbers& numbers, int64_t batch_sizes,
                           const LstmWeightAddresses& weights, int64_t key, double dropout, double eps,
                           const std::array<int64_t, 13>& inputs, const std::array<int64_t, 18>& outputs,
                           int64_t scratch, const std::string& dtype, uintptr_t stream) {
  const DTypeInfo info = dtype_info(dtype);
  const LstmSizes sizes = lstm_sizes(numbers, batch_sizes);
  const bool hyper = sizes.M > 0;
  const auto [x, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z, dh, dh_last, dc_last, dhyper_h_last,
              dhyper_c_last] = inputs;
  const auto [dx, dh_gates, dhyper_gates, dz, dh0, dc0, dhyper_h0, dhyper_c0, dbias, dd_weight] =
      std::array<int64_t, 10>{outputs[0], outputs[1], outputs[2], outputs[3], outputs[4],
                              outputs[5], outputs[6], outputs[7], outputs[8], outputs[9]};
  check_present("", "x_gates, c0, c, h_gates, dx_gates, dh0, dc0 and dbias",
                {x, c0, c, h_gates, dx, dh0, dc0, dbias});
  check_together(
      "hyper tensors",
      {hyper_c0, hyper_c, hyper_gates, z, dh_gates, dhyper_gates, dz, dhyper_h0, dhyper_c0, dd_weight},
      hyper);
  if (!hyper) check_together("hyper tensors", {dhyper_h_last, dhyper_c_last}, false);
  check_aligned("",
                {x, h_gates, hyper_gates, z, dh, dh_last, dhyper_h_last, dx, dh_gates, dhyper_gates, dz, dh0,
                 dhyper_h0, dbias, dd_weight},
                info.bytes);
  check_aligned("", {c0, hyper_c0, c, hyper_c, dc_last, dhyper_c_last, dc0, dhyper_c0}, sizeof(float));
  const LstmWeights checked = lstm_weights(weights, hyper, info.bytes);
  const int64_t *dnorms = &outputs[10], *dhyper = &outputs[14];
  check_together("gradients of norms", {dnorms[0], dnorms[1], dnorms[2], dnorms[3]}, weights[7] != 0);
  check_together("gradients of hyper norms", {dhyper[0], dhyper[1], dhyper[2], dhyper[3]}, weights[11] != 0);
  for (int i = 10; i < 18; ++i) check_aligned("", {outputs[i]}, sizeof(float));
  check_lstm("lstm_backward", sizes, info, true, scratch);
  const LstmBackward call{sizes,
                          checked,
                          lstm_dropout(key, dropout),
                          eps,
                          pointer(x),
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
                          pointer(dx),
                          pointer(dh_gates),
                          pointer(dhyper_gates),
                          pointer(dz),
                          pointer(dh0),
                          pointer(dc0),
                          pointer(dhyper_h0),
                          pointer(dhyper_c0),
                          pointer(dbias),
                          pointer(dd_weight),
                          {pointer(dnorms[0]), pointer(dnorms[1]), pointer(dnorms[2]), pointer(dnorms[3])},
                          {pointer(dhyper[0]), pointer(dhyper[1]), pointer(dhyper[2]), pointer(dhyper[3])},
                          pointer<float>(scratch)};
  check_done("lstm_backward", lstm_backward(call, info.dtype, stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of hyperfast over plain addresses, sizes and a stream; use hyperfast.ops.\n\n"
      "Addresses are those of contiguous data on the current device, 0 for what is not there; dtype is "
      "'float32', 'float64', 'float16' or 'bfloat16'; stream is a cudaStream_t. Nothing is allocated or "
      "waited "
      "for. ValueError for bad input, RuntimeError with CUDA's message where a launch fails.";
  m.def("generate", &generate_binding, py::arg("segments"), py::arg("dtype"), py::arg("stream"),
        "segments: (weight, bias or 0, z, out, N, K) each; sums in float32, float64 for float64.");
  m.def("generate_backward_scratch", &generate_backward_scratch_binding, py::arg("sizes"),
        "Doubles of scratch that generate_backward needs for segments of these (N, K).");
  m.def("generate_backward", &generate_backward_binding, py::arg("segments"), py::arg("scratch"),
        py::arg("dtype"), py::arg("stream"),
        "segments: (weight, dw, dz, squared_norm, N, K) each; squared_norm addresses one float64.");
  m.def("update_generate", &update_generate_binding, py::arg("segments"), py::arg("coefficients"),
        py::arg("bias_coefficients"), py::arg("rule"), py::arg("storage"), py::arg("grad_scale"),
        py::arg("seeds"), py::arg("skip"), py::arg("dtype"), py::arg("stream"),
        "segments: (weight, state, scales, second state, scales, bias, its four, dw, z, new_z, w, N, K, "
        "whether "
        "bias is trained) each. Addresses of float64 coefficients and bias_coefficients [L, fields of the "
        "rule] "
        "and grad_scale, int64 seeds [L], float32 skip or 0: hyperfast/ops/update_generate.py.");
  m.def("hyper_linear_scratch", &hyper_linear_scratch_binding, py::arg("sizes"), py::arg("dtype"),
        "Floats of scratch that hyper_linear needs for sizes (M, O, I, K).");
  m.def("hyper_linear", &hyper_linear_binding, py::arg("tensors"), py::arg("sizes"), py::arg("dtype"),
        py::arg("stream"),
        "tensors: (weight [O I, K], bias [O I] or 0, z [K], x [M, I], layer_bias [O] or 0, y [M, O], scratch "
        "or "
        "0); sizes: (M, O, I, K), M at most 64. Not for float64.");
  m.def("lstm_refuses", &lstm_refuses_binding, py::arg("sizes"), py::arg("batch_sizes"), py::arg("dtype"),
        py::arg("backward"),
        "Why the current device does not serve sizes (T, N, B, H, M, Z); empty where it does. batch_sizes: "
        "address of int64 [T] on the host.");
  m.def("lstm_scratch", &lstm_scratch_binding, py::arg("sizes"), py::arg("batch_sizes"), py::arg("dtype"),
        py::arg("backward"), "Floats of scratch that lstm or lstm_backward needs; 0 where it is not served.");
  m.def("lstm", &lstm_binding, py::arg("sizes"), py::arg("batch_sizes"), py::arg("weights"), py::arg("key"),
        py::arg("dropout"), py::arg("eps"), py::arg("tensors"), py::arg("scratch"), py::arg("dtype"),
        py::arg("stream"),
        "weights: weight_hh, bias, hyper_weight_xh, hyper_weight_hh, z_weight, z_bias, d_weight, 4 norms, 4 "
        "hyper norms; tensors: x_gates, hyper_x_gates, h0, c0, hyper_h0, hyper_c0, h, c, hyper_h, hyper_c, "
        "h_gates or 0, hyper_gates or 0. Norms and c in float32, all else in dtype. Not for float64.");
  m.def(
      "lstm_backward", &lstm_backward_binding, py::arg("sizes"), py::arg("batch_sizes"), py::arg("weights"),
      py::arg("key"), py::arg("dropout"), py::arg("eps"), py::arg("inputs"), py::arg("outputs"),
      py::arg("scratch"), py::arg("dtype"), py::arg("stream"),
      "inputs: x_gates, c0, hyper_c0, c, hyper_c, h_gates, hyper_gates, z, dh, dh_last, dc_last, "
      "dhyper_h_last, dhyper_c_last, the last five or 0; outputs: dx_gates, dh_gates (0 without hyper: it is "
      "dx_gates), dhyper_gates, dz, dh0, dc0, dhyper_h0, dhyper_c0, dbias, dd_weight, 4 dnorms, 4 "
      "dhyper_norms.");
  m.attr("MAX_ROWS") = kMaxRows;
}
