// hyperfast._cpu: the CPU kernels for Python. Tensors come as addresses; hyperfast/ops checks shapes, dtypes
// and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

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

void generate(const Table<6>& table, const std::string& dtype, int threads) {
  std::vector<GenerateSegment> segments;
  for (const auto& [weight, bias, z, w, N, K] : table) {
    check_sizes(N, K, threads);
    segments.push_back({pointer(weight), pointer(bias), pointer(z), pointer(w), N, K});
  }
  const DType type = dtype_of(dtype);
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
  py::gil_scoped_release release;
  kernels().update_generate(segments.data(), segments.size(), type, kind, stored, grad_scale, threads);
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
}
