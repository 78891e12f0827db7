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
      throw py::value_error(where + "a pointer is not aligned to elements of " + std::to_string(bytes) + " bytes");
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
    table.push_back({pointer(weight), pointer(dw), pointer(dz), pointer<double>(squared_norm), N,
                     static_cast<int>(K)});
  }
  check_done("generate_backward", generate_backward(table.data(), table.size(), pointer<double>(scratch),
                                                    info.dtype, stream));
}

Updated updated(int64_t values, const std::array<int64_t, 4>& states) {
  return {pointer(values),
          {pointer(states[0]), pointer(states[2])},
          {pointer<float>(states[1]), pointer<float>(states[3])}};
}

// The states (address, scales, address, scales) of what is updated: as many as the rule has, scales in 8 bits.
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
      "storage",
      {{"plain", Storage::plain}, {"bfloat16", Storage::bfloat16}, {"8bit", Storage::eight_bit}}, storage);
  if (stored != Storage::plain && info.dtype != DType::f32)
    throw py::value_error("states are stored as " + storage + " beside float32 weights only, got " + dtype);
  const int64_t state_bytes = stored == Storage::plain ? info.bytes : stored == Storage::bfloat16 ? 2 : 1;
  const bool with_states = kind == Rule::adam || (!segments.empty() && segments[0][1]);
  if (stored != Storage::plain && !with_states)
    throw py::value_error("there is no state to store as " + storage);
  const int states = kind == Rule::adam ? 2 : with_states ? 1 : 0;
  check_present("", "coefficients, bias_coefficients, grad_scale and seeds",
                {coefficients, bias_coefficients, grad_scale, seeds});
  check_aligned("", {coefficients, bias_coefficients, grad_scale, seeds}, 8);
  check_aligned("", {skip}, sizeof(float));
  std::vector<UpdateGenerateSegment> table;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto [weight, s0, c0, s1, c1, bias, bs0, bc0, bs1, bc1, dw, z, z_next, w, N, K, trained] = segments[i];
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
  check_done("update_generate", update_generate(table.data(), table.size(), numbers, kind, with_states, stored,
                                                info.dtype, stream));
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
  if (info.dtype == DType::f64) throw py::value_error("dtype is 'float64'; wanted float32, float16 or bfloat16");
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
  const HyperLinear call{pointer(weight), pointer(bias), pointer(z),
                         pointer(x),      pointer(layer_bias), pointer(y),
                         pointer<float>(scratch), M, O, I, static_cast<int>(K)};
  check_done("hyper_linear", hyper_linear(call, info.dtype, stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() =
      "CUDA kernels of hyperfast over plain addresses, sizes and a stream; use hyperfast.ops.\n\n"
      "Addresses are those of contiguous data on the current device, 0 for what is not there; dtype is "
      "'float32', 'float64', 'float16' or 'bfloat16'; stream is a cudaStream_t. Nothing is allocated or waited "
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
        "segments: (weight, state, scales, second state, scales, bias, its four, dw, z, new_z, w, N, K, whether "
        "bias is trained) each. Addresses of float64 coefficients and bias_coefficients [L, fields of the rule] "
        "and grad_scale, int64 seeds [L], float32 skip or 0: hyperfast/ops/update_generate.py.");
  m.def("hyper_linear_scratch", &hyper_linear_scratch_binding, py::arg("sizes"), py::arg("dtype"),
        "Floats of scratch that hyper_linear needs for sizes (M, O, I, K).");
  m.def("hyper_linear", &hyper_linear_binding, py::arg("tensors"), py::arg("sizes"), py::arg("dtype"),
        py::arg("stream"),
        "tensors: (weight [O I, K], bias [O I] or 0, z [K], x [M, I], layer_bias [O] or 0, y [M, O], scratch or "
        "0); sizes: (M, O, I, K), M at most 64. Not for float64.");
  m.attr("MAX_ROWS") = kMaxRows;
}
