// The blocks and fibers of emulator.h, on x86-64.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

// Keeps the registers a call must keep on the stack, its top in *from, and goes on where `to` was kept.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulator {
namespace {

constexpr size_t kStack = 128 * 1024;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxShared = 232448;  // of a block on sm_90

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
};

void complete(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

enum class Wait { nothing, block, warp, barrier, end };

struct Fiber {
  void* top;
  Wait wait;
  uint64_t* barrier;  // waited for, and its parity
  uint32_t parity;
  const char* operation;  // of the warp, and what was handed over and given back
  unsigned mask;
  uint64_t given, values[32];
  std::vector<std::vector<Copy>> groups;  // of asynchronous copies; the last one is not committed
};

struct BarrierState {
  int arrivals, missing;
  int64_t bytes;
  uint32_t phase;
};

struct Freed {
  void operator()(void* p) const { std::free(p); }
};
using Memory = std::unique_ptr<unsigned char, Freed>;

unsigned schedule = 0;
uint64_t random_state = 1;
Fiber fibers[kMaxThreads];
char* stacks = nullptr;
void* scheduler = nullptr;
int running = 0, thread_count = 0;
uint64_t ready[kMaxThreads / 64];  // a bit for each fiber that could go on
int at_barrier = 0, ended = 0;     // fibers that wait for the block, that have ended
const std::function<void()>* body = nullptr;
std::map<const void*, Memory> memory;  // of the block; null: the dynamic part
size_t dynamic_bytes = 0;
std::map<uint64_t*, BarrierState> barriers;
std::vector<Copy> in_flight;
std::string failure;

uint64_t draw(uint64_t below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % below;
}

void yield() { emulator_switch(&fibers[running].top, scheduler); }

void enter() {
  (*body)();
  Fiber& self = fibers[running];
  for (const auto& group : self.groups)
    if (!group.empty()) fault("a thread ends with copies it never waited for");
  self.wait = Wait::end;
  yield();
}

Memory poisoned(size_t bytes) {
  // malloc's alignment is that of the largest vectors here, and AddressSanitizer sees the end to the byte
  void* p = std::malloc(bytes);
  std::memset(p, 0xff, bytes);
  return Memory(static_cast<unsigned char*>(p));
}

void set_ready(int i) {
  fibers[i].wait = Wait::nothing;
  ready[i / 64] |= uint64_t(1) << i % 64;
}

void prepare(int i) {
  Fiber& fiber = fibers[i];
  set_ready(i);
  fiber.groups.assign(1, {});
  void** top = reinterpret_cast<void**>(stacks + (i + 1) * kStack) - 2;  // enter sees an aligned stack
  *top = reinterpret_cast<void*>(&enter);
  fiber.top = top - 6;
  std::fill(top - 6, top, nullptr);
}

void release_block() {
  if (at_barrier == 0 || at_barrier + ended < thread_count) return;
  for (int i = 0; i < thread_count; ++i)
    if (fibers[i].wait == Wait::block) set_ready(i);
  at_barrier = 0;
}

// If all lanes of the mask of the one that came last are there.
void release_warp(int last) {
  Fiber* lanes = fibers + last / 32 * 32;
  const Fiber& self = fibers[last];
  for (int lane = 0; lane < 32; ++lane)
    if (self.mask >> lane & 1 && (lanes[lane].wait != Wait::warp || lanes[lane].mask != self.mask)) return;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(self.mask >> lane & 1)) continue;
    if (std::strcmp(lanes[lane].operation, self.operation))
      failure = std::string("lanes of a warp meet in ") + self.operation + " and " + lanes[lane].operation;
    for (int i = 0; i < 32; ++i) lanes[lane].values[i] = lanes[i].given;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (self.mask >> lane & 1) set_ready(last / 32 * 32 + lane);
}

void count(uint64_t* barrier, int arrivals, int64_t bytes) {
  BarrierState& state = barriers.at(barrier);
  state.missing -= arrivals;
  state.bytes += bytes;
  if (state.missing < 0) fault("more arrivals at a barrier than it was made for");
  if (state.missing == 0 && state.bytes == 0) {
    state.missing = state.arrivals;
    ++state.phase;
    for (int i = 0; i < thread_count; ++i)
      if (fibers[i].wait == Wait::barrier && fibers[i].barrier == barrier && state.phase % 2 != fibers[i].parity)
        set_ready(i);
  }
}

void arrive_one() {  // of the copies in flight
  const size_t i = schedule < 2 ? in_flight.size() - 1 : draw(in_flight.size());
  const Copy copy = in_flight[i];
  in_flight.erase(in_flight.begin() + i);
  complete(copy);
  count(copy.barrier, 0, -int64_t(copy.bytes));
}

std::string where_they_wait() {
  int at[5] = {};
  for (int i = 0; i < thread_count; ++i) ++at[int(fibers[i].wait)];
  return "threads wait for ever: " + std::to_string(at[1]) + " for the block, " + std::to_string(at[2]) +
         " for their warp, " + std::to_string(at[3]) + " for copies, " + std::to_string(at[4]) + " have ended";
}

// A fiber that could go on, or -1.
int choose() {
  const int words = (thread_count + 63) / 64;
  if (schedule == 1) {
    for (int w = words - 1; w >= 0; --w)
      if (ready[w]) return 64 * w + 63 - __builtin_clzll(ready[w]);
    return -1;
  }
  const int start = schedule == 0 ? 0 : int(draw(thread_count));  // the first from there on, around the end
  for (int step = 0; step <= words; ++step) {
    const int w = (start / 64 + step) % words;
    uint64_t bits = ready[w];
    if (step == 0) bits &= ~uint64_t(0) << start % 64;
    if (bits) return 64 * w + __builtin_ctzll(bits);
  }
  return -1;
}

void run_block() {
  std::fill(std::begin(ready), std::end(ready), 0);
  for (int i = 0; i < thread_count; ++i) prepare(i);
  memory.clear();
  if (dynamic_bytes) memory[nullptr] = poisoned(dynamic_bytes);
  barriers.clear();
  in_flight.clear();
  at_barrier = ended = 0;
  while (failure.empty()) {
    const int next = choose();
    if (next < 0 && in_flight.empty()) break;
    if (next < 0) {
      arrive_one();
      continue;
    }
    running = next;
    thread.x = unsigned(running);
    emulator_switch(&scheduler, fibers[running].top);
    if (fibers[running].wait != Wait::nothing) ready[running / 64] &= ~(uint64_t(1) << running % 64);
    if (fibers[running].wait == Wait::warp) release_warp(running);
    at_barrier += fibers[running].wait == Wait::block;
    ended += fibers[running].wait == Wait::end;
    release_block();
  }
  if (failure.empty() && ended < thread_count) failure = where_they_wait();
  if (failure.empty() && !in_flight.empty()) failure = "a block ends with copies it never waited for";
}

void check_copy(const void* shared, const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16)
    fault("an asynchronous copy needs addresses and sizes that are multiples of 16 bytes");
}

}  // namespace

void set_schedule(unsigned number) {
  schedule = number;
  random_state = 0x9e3779b97f4a7c15ull * (number + 1);
}

[[noreturn]] void fault(const std::string& what) {
  failure = what;
  yield();
  std::abort();  // a fiber that failed never goes on
}

cudaError_t run(int blocks, int threads, size_t shared, const std::function<void()>& kernel) {
  failure.clear();
  if (blocks < 1 || threads < 1 || threads > kMaxThreads || threads % 32 || shared > kMaxShared)
    return cudaErrorInvalidConfiguration;
  if (!stacks) {
    void* made = mmap(nullptr, kMaxThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (made == MAP_FAILED) return cudaErrorMemoryAllocation;
    stacks = static_cast<char*>(made);
  }
  body = &kernel;
  thread_count = threads;
  dynamic_bytes = shared;
  block_size.x = unsigned(threads);
  grid_size.x = unsigned(blocks);
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule >= 2)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  for (const unsigned number : order) {
    block.x = number;
    run_block();
    if (!failure.empty()) return cudaErrorLaunchFailure;
  }
  memory.clear();
  return cudaSuccess;
}

void wait_for_block() {
  fibers[running].wait = Wait::block;
  yield();
}

const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value) {
  Fiber& self = fibers[running];
  if (!(mask >> running % 32 & 1)) fault(std::string(operation) + " by a lane that is not in its mask");
  self.wait = Wait::warp;
  self.operation = operation;
  self.mask = mask;
  self.given = value;
  yield();
  return self.values;
}

void* shared_memory(const void* key, size_t bytes) {
  Memory& found = memory[key];
  if (!found) found = poisoned(bytes);
  return found.get();
}

unsigned char* dynamic_shared_memory() {
  const auto found = memory.find(nullptr);
  if (found == memory.end()) fault("a kernel without dynamic shared memory asks for it");
  return found->second.get();
}

void copy_async(void* shared, const void* global) {
  check_copy(shared, global, 16);
  const Copy copy{shared, global, 16, nullptr};
  if (schedule % 2) complete(copy);
  fibers[running].groups.back().push_back(copy);
}

void commit_copies() { fibers[running].groups.emplace_back(); }

void wait_copies(int newest) {
  auto& groups = fibers[running].groups;
  while (int(groups.size()) - 1 > newest) {
    if (schedule % 2 == 0)
      for (const Copy& copy : groups.front()) complete(copy);
    groups.erase(groups.begin());
  }
}

void init_barrier(uint64_t* barrier, int arrivals) { barriers[barrier] = {arrivals, arrivals, 0, 0}; }

void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  if (!barriers.count(barrier)) fault("a barrier is used before it was made");
  count(barrier, 1, bytes);
}

void wait_barrier(uint64_t* barrier, uint32_t parity) {
  if (!barriers.count(barrier)) fault("a barrier is used before it was made");
  if (barriers[barrier].phase % 2 != parity) return;
  Fiber& self = fibers[running];
  self.wait = Wait::barrier;
  self.barrier = barrier;
  self.parity = parity;
  yield();
}

void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(shared, global, bytes);
  if (!barriers.count(barrier)) fault("a barrier is used before it was made");
  in_flight.push_back({shared, global, bytes, barrier});
  if (schedule % 2) arrive_one();
}

}  // namespace emulator

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emulator::failure.c_str();
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "CUDA error";
}

// For Python: which order threads, blocks and copies come in.
__attribute__((visibility("default"))) void emulator_set_schedule(unsigned schedule) {
  emulator::set_schedule(schedule);
}
}
