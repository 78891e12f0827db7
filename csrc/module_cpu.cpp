// hyperfast._cpu: the CPU kernels for Python. Tensors come as addresses; hyperfast/ops checks shapes, dtypes
// and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
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
  py::gil_scoped_release release;
  kernels().adamw_generate(segments.data(), segments.size(), type, grad_scale, threads);
}

PooledImages images_of(const std::array<int64_t, 5>& sizes, int threads) {
  const auto [B, H, W, C, P] = sizes;
  if (B < 1 || C < 1 || P < 1 || P > 2 || H < P || W < P || threads < 1)
    throw py::value_error("need B, C, threads >= 1, P 1 or 2, H and W >= P");
  return {B, H, W, C, P};
}

void batch_norm(const std::array<int64_t, 5>& sizes, int64_t x, int64_t weight, int64_t bias,
                int64_t statistics, int64_t batch, double eps, int64_t y, int64_t index,
                const std::string& dtype, int threads) {
  const PooledImages images = images_of(sizes, threads);
  double* mean = pointer<double>(statistics);
  const BatchNormSegment segment{
      images,         pointer(x), pointer(weight), pointer(bias),          mean, mean + images.C,
      pointer(batch), eps,        pointer(y),      pointer<uint8_t>(index)};
  const DType type = dtype_of(dtype);
  py::gil_scoped_release release;
  const std::unique_ptr<double[]> scratch(new double[images.scratch()]);
  kernels().batch_norm(segment, type, scratch.get(), threads);
}

void batch_norm_backward(const std::array<int64_t, 5>& sizes, int64_t x, int64_t dy, int64_t index,
                         int64_t weight, int64_t statistics, bool given, double eps, int64_t dx,
                         int64_t dweight, int64_t dbias, const std::string& dtype, int threads) {
  const PooledImages images = images_of(sizes, threads);
  const double* mean = pointer<double>(statistics);
  const BatchNormBackwardSegment segment{
      images, pointer(x), pointer(dy), pointer<uint8_t>(index), pointer(weight), mean, mean + images.C,
      given,  eps,        pointer(dx), pointer(dweight),        pointer(dbias)};
  const DType type = dtype_of(dtype);
  py::gil_scoped_release release;
  const std::unique_ptr<double[]> scratch(new double[images.scratch()]);
  kernels().batch_norm_backward(segment, type, scratch.get(), threads);
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
  m.def("batch_norm", &batch_norm, py::arg("sizes"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("statistics"), py::arg("batch"), py::arg("eps"), py::arg("y"), py::arg("index"),
        py::arg("dtype"), py::arg("threads"),
        "sizes: (B, H, W, C, P); addresses; statistics: mean [C] and var [C], float64, given if batch is 0; "
        "weight, "
        "bias, index may be 0.");
  m.def("batch_norm_backward", &batch_norm_backward, py::arg("sizes"), py::arg("x"), py::arg("dy"),
        py::arg("index"), py::arg("weight"), py::arg("statistics"), py::arg("given"), py::arg("eps"),
        py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("dtype"), py::arg("threads"),
        "As batch_norm; dx may be 0.");
}
