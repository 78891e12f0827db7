// Chooses the instruction set once: the best the processor has, or the one HYPERFAST_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace hyperfast {

#define HYPERFAST_KERNELS(isa)                                                                             \
  Kernels {                                                                                                \
    #isa, isa::generate, isa::generate_backward, isa::update_generate, isa::hyper_linear,                  \
        isa::hyper_linear_backward, isa::generate_units, isa::generate_units_backward, isa::outer_product, \
        isa::outer_product_backward, isa::im2col, isa::col2im, isa::lstm_pack, isa::lstm,                  \
        isa::lstm_backward_pack, isa::lstm_backward, isa::batch_norm, isa::batch_norm_backward             \
  }

int supported(const Kernels** out, int capacity) {
  static const Kernels scalar_kernels = HYPERFAST_KERNELS(scalar);
  int count = 0;
  const auto add = [&](const Kernels& k, bool have) {
    if (have && count < capacity) out[count++] = &k;
  };
  add(scalar_kernels, true);
#ifdef __x86_64__
  static const Kernels avx2_kernels = HYPERFAST_KERNELS(avx2), avx512_kernels = HYPERFAST_KERNELS(avx512);
  const bool have_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  add(avx2_kernels, have_avx2);
  add(avx512_kernels, have_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#endif
  return count;
}

static const Kernels& choose() {
  const Kernels* found[8];
  const int count = supported(found, 8);
  const char* wanted = std::getenv("HYPERFAST_ISA");
  if (!wanted || !*wanted) return *found[count - 1];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (std::string(wanted) == found[i]->isa) return *found[i];
    names += (i ? ", " : "") + std::string(found[i]->isa);
  }
  throw std::runtime_error("HYPERFAST_ISA=" + std::string(wanted) + " is not available here; choose one of " +
                           names);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace hyperfast
