// Sizes that are rounded, and parts of one piece of memory.
#pragma once
#include <cstdint>

namespace hyperfast {

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Parts of one piece of memory, counted (base null) or handed out.
struct Scratch {
  char* base;
  int64_t bytes = 0;
  explicit Scratch(void* base) : base(static_cast<char*>(base)) {}
  template <class Part>
  Part* take(int64_t count) {
    char* at = base ? base + bytes : nullptr;
    bytes += round_up(count * int64_t(sizeof(Part)), 64);
    return reinterpret_cast<Part*>(at);
  }
};

}  // namespace hyperfast
