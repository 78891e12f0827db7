// hyperfast._cuda: the CUDA kernels over plain integers. Checks what a kernel cannot; shapes and devices of
// tensors are the caller's to check, and the tensors' device must be the current one.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/generate.h"

namespace py = pybind11;
using namespace hyperfast::cuda;

namespace {

using SegmentTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;

struct DTypeInfo {
  DType dtype;
  uintptr_t bytes;
};

DTypeInfo dtype_info(const std::string& name) {
  static const std::map<std::string, DTypeInfo> known = {{"float32", {DType::f32, 4}},
                                                         {"float64", {DType::f64, 8}},
                                                         {"float16", {DType::f16, 2}},
                                                         {"bfloat16", {DType::bf16, 2}}};
  const auto found = known.find(name);
  if (found == known.end())
    throw py::value_error("dtype is '" + name + "'; wanted float32, float64, float16 or bfloat16");
  return found->second;
}

void generate_binding(const std::vector<SegmentTuple>& segments, const std::string& dtype, uintptr_t stream) {
  const DTypeInfo info = dtype_info(dtype);
  std::vector<GenerateSegment> table;
  for (size_t i = 0; i < segments.size(); ++i) {
    const auto [weight, bias, z, out, N, K] = segments[i];
    const std::string where = "segments[" + std::to_string(i) + "]: ";
    if (N < 0) throw py::value_error(where + "N is " + std::to_string(N) + "; wanted N >= 0");
    if (K < 1 || K > kMaxK)
      throw py::value_error(where + "K is " + std::to_string(K) + "; wanted 1 to " + std::to_string(kMaxK));
    if (N == 0) continue;
    if (!weight || !z || !out) throw py::value_error(where + "weight, z and out must not be null");
    if ((weight | bias | z | out) % info.bytes)
      throw py::value_error(where + "a pointer is not aligned to " + dtype);
    table.push_back({reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias),
                     reinterpret_cast<const void*>(z), reinterpret_cast<void*>(out), N, static_cast<int>(K)});
  }
  if (const char* error = generate(table.data(), table.size(), info.dtype, stream))
    throw std::runtime_error("hyperfast._cuda.generate: " + std::string(error));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of hyperfast over plain pointers, sizes and a stream";
  m.def("generate", &generate_binding, py::arg("segments"), py::arg("dtype"), py::arg("stream"),
        R"(w[n] = sum_k weight[n, k] z[k] + bias[n] for every segment, queued on a stream.

segments: list of (weight [N, K], bias [N] or 0, z [K], out [N], N, K), the first four as device addresses of
contiguous data; one launch covers 64 segments. dtype: 'float32', 'float64', 'float16' or 'bfloat16' of all four;
sums in float32, float64 for float64. stream: a cudaStream_t as integer, of the current device.
Raises ValueError for bad input and RuntimeError with CUDA's message where the launch fails.)");
}
