// hyperfast._cpu: the CPU kernels for Python. Tensors come as addresses; hyperfast/ops checks shapes, dtypes
// and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

// Addresses come first in a row, then N and K. The kernels read elements where elements may lie.
template <size_t Fields>
void check_aligned(const Table<Fields>& table, DType dtype) {
  const int64_t size = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  for (const auto& row : table)
    for (size_t f = 0; f + 2 < Fields; ++f)
      if (row[f] % size)
        throw py::value_error("a tensor begins at an address that is no multiple of its elements' " +
                              std::to_string(size) + " bytes: clone() it");
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

AdamWCoefficients adamw_of(const double* c) { return {c[0], c[1], c[2], c[3], c[4], c[5]}; }

void adamw_generate(const Table<12>& table, const std::vector<std::array<double, 12>>& coefficients,
                    double grad_scale, const std::string& dtype, int threads) {
  if (table.size() != coefficients.size()) throw py::value_error("one row of coefficients for each segment");
  std::vector<AdamWGenerateSegment> segments;
  for (size_t i = 0; i < table.size(); ++i) {
    const auto& [weight, m, v, bias, bias_m, bias_v, dw, z, z_next, w, N, K] = table[i];
    check_sizes(N, K, threads);
    segments.push_back({pointer(weight), pointer(m), pointer(v), pointer(bias), pointer(bias_m),
                        pointer(bias_v), pointer(dw), pointer(z), pointer(z_next), pointer(w), N, K,
                        adamw_of(coefficients[i].data()), adamw_of(coefficients[i].data() + 6)});
  }
  const DType type = dtype_of(dtype);
  check_aligned(table, type);
  py::gil_scoped_release release;
  kernels().adamw_generate(segments.data(), segments.size(), type, grad_scale, threads);
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
  m.def("adamw_generate", &adamw_generate, py::arg("segments"), py::arg("coefficients"),
        py::arg("grad_scale"), py::arg("dtype"), py::arg("threads"),
        "segments: (weight, exp_avg, exp_avg_sq, bias, bias_exp_avg, bias_exp_avg_sq, dw, z, z_next, w, N, "
        "K) each; "
        "coefficients: (decay, step_size, beta1, beta2, sqrt(1 - beta2^t), eps) of weight, then of bias.");
}
