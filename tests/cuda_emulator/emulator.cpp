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

enum class Wait { nothing, block, warp, barrier, grid, end };

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

struct Block {
  unsigned number;
  std::vector<Fiber> fibers;
  uint64_t ready[kMaxThreads / 64];      // a bit for each fiber that could go on
  int at_barrier, at_grid, ended;        // fibers that wait for the block, for the grid, that have ended
  std::map<const void*, Memory> memory;  // null: the dynamic part
  std::map<uint64_t*, BarrierState> barriers;
  std::vector<Copy> in_flight;
};

unsigned schedule = 0;
uint64_t random_state = 1;
int multiprocessors = 4, most_resident = -1;
char* stacks = nullptr;
size_t stack_count = 0;
void* scheduler = nullptr;
std::vector<Block> blocks;  // that run: one, or all of a cooperative launch
Block* now = nullptr;       // and a fiber of it
int running = 0, thread_count = 0;
bool is_cooperative = false;
const std::function<void()>* body = nullptr;
size_t dynamic_bytes = 0;
std::string failure;

uint64_t draw(uint64_t below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state % below;
}

Fiber& self() { return now->fibers[running]; }

void yield() { emulator_switch(&self().top, scheduler); }

void enter() {
  (*body)();
  for (const auto& group : self().groups)
    if (!group.empty()) fault("a thread ends with copies it never waited for");
  self().wait = Wait::end;
  yield();
}

Memory poisoned(size_t bytes) {
  // malloc's alignment is that of the largest vectors here, and AddressSanitizer sees the end to the byte
  void* p = std::malloc(bytes);
  std::memset(p, 0xff, bytes);
  return Memory(static_cast<unsigned char*>(p));
}

void set_ready(Block& block, int i) {
  block.fibers[i].wait = Wait::nothing;
  block.ready[i / 64] |= uint64_t(1) << i % 64;
}

void prepare(Block& block, int place, unsigned number) {
  block.number = number;
  block.fibers.resize(thread_count);
  std::fill(std::begin(block.ready), std::end(block.ready), 0);
  for (int i = 0; i < thread_count; ++i) {
    set_ready(block, i);
    block.fibers[i].groups.assign(1, {});
    char* end = stacks + (size_t(place) * thread_count + i + 1) * kStack;
    void** top = reinterpret_cast<void**>(end) - 2;  // enter sees an aligned stack
    *top = reinterpret_cast<void*>(&enter);
    block.fibers[i].top = top - 6;
    std::fill(top - 6, top, nullptr);
  }
  block.memory.clear();
  if (dynamic_bytes) block.memory[nullptr] = poisoned(dynamic_bytes);
  block.barriers.clear();
  block.in_flight.clear();
  block.at_barrier = block.at_grid = block.ended = 0;
}

void release_block(Block& block) {
  if (block.at_barrier == 0 || block.at_barrier + block.ended < thread_count) return;
  for (int i = 0; i < thread_count; ++i)
    if (block.fibers[i].wait == Wait::block) set_ready(block, i);
  block.at_barrier = 0;
}

// If every thread of every block is there: one that has ended never comes.
void release_grid() {
  for (const Block& block : blocks)
    if (block.at_grid < thread_count) return;
  for (Block& block : blocks) {
    for (int i = 0; i < thread_count; ++i) set_ready(block, i);
    block.at_grid = 0;
  }
}

// If all lanes of the mask of the one that came last are there.
void release_warp(int last) {
  Fiber* lanes = now->fibers.data() + last / 32 * 32;
  const Fiber& self = now->fibers[last];
  for (int lane = 0; lane < 32; ++lane)
    if (self.mask >> lane & 1 && (lanes[lane].wait != Wait::warp || lanes[lane].mask != self.mask)) return;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(self.mask >> lane & 1)) continue;
    if (std::strcmp(lanes[lane].operation, self.operation))
      failure = std::string("lanes of a warp meet in ") + self.operation + " and " + lanes[lane].operation;
    for (int i = 0; i < 32; ++i) lanes[lane].values[i] = lanes[i].given;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (self.mask >> lane & 1) set_ready(*now, last / 32 * 32 + lane);
}

void count(Block& block, uint64_t* barrier, int arrivals, int64_t bytes) {
  BarrierState& state = block.barriers.at(barrier);
  state.missing -= arrivals;
  state.bytes += bytes;
  if (state.missing < 0) fault("more arrivals at a barrier than it was made for");
  if (state.missing == 0 && state.bytes == 0) {
    state.missing = state.arrivals;
    ++state.phase;
    for (int i = 0; i < thread_count; ++i) {
      const Fiber& fiber = block.fibers[i];
      if (fiber.wait == Wait::barrier && fiber.barrier == barrier && state.phase % 2 != fiber.parity)
        set_ready(block, i);
    }
  }
}

void arrive_one(Block& block) {  // of the copies in flight
  const size_t i = schedule < 2 ? block.in_flight.size() - 1 : draw(block.in_flight.size());
  const Copy copy = block.in_flight[i];
  block.in_flight.erase(block.in_flight.begin() + i);
  complete(copy);
  count(block, copy.barrier, 0, -int64_t(copy.bytes));
}

std::string where_they_wait() {
  int at[6] = {};
  for (const Block& block : blocks)
    for (const Fiber& fiber : block.fibers) ++at[int(fiber.wait)];
  return "threads wait for ever: " + std::to_string(at[1]) + " for the block, " + std::to_string(at[2]) +
         " for their warp, " + std::to_string(at[3]) + " for copies, " + std::to_string(at[4]) +
         " for the grid, " + std::to_string(at[5]) + " have ended";
}

// A fiber of the block that could go on, or -1.
int choose(const Block& block) {
  const uint64_t* ready = block.ready;
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

// Chooses the block and the fiber of it that goes on, and lets copies arrive where none can; whether there is
// one.
bool choose_next(int& next) {
  const int count = int(blocks.size());
  const int start = schedule == 0 ? 0 : schedule == 1 ? count - 1 : int(draw(count));
  for (int step = 0; step < count; ++step) {
    now = &blocks[(start + (schedule == 1 ? count - step : step)) % count];
    while ((next = choose(*now)) < 0 && !now->in_flight.empty() && now->ended < thread_count)
      arrive_one(*now);
    if (next >= 0) return true;
  }
  return false;
}

void run_fiber(int number) {
  running = number;
  thread.x = unsigned(number);
  block.x = now->number;
  emulator_switch(&scheduler, self().top);
  if (self().wait != Wait::nothing) now->ready[number / 64] &= ~(uint64_t(1) << number % 64);
  if (self().wait == Wait::warp) release_warp(number);
  now->at_barrier += self().wait == Wait::block;
  now->at_grid += self().wait == Wait::grid;
  now->ended += self().wait == Wait::end;
  const bool at_grid = self().wait == Wait::grid;
  release_block(*now);
  if (at_grid) release_grid();
}

// The blocks with these numbers, at once.
void run_blocks(const unsigned* numbers, int count) {
  blocks.resize(count);
  for (int i = 0; i < count; ++i) prepare(blocks[i], i, numbers[i]);
  int next;
  while (failure.empty() && choose_next(next)) run_fiber(next);
  for (const Block& block : blocks) {
    if (failure.empty() && block.ended < thread_count) failure = where_they_wait();
    if (failure.empty() && !block.in_flight.empty()) failure = "a block ends with copies it never waited for";
  }
}

bool make_stacks(size_t count) {
  if (count <= stack_count) return true;
  if (stacks) munmap(stacks, stack_count * kStack);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* made = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
  stacks = made == MAP_FAILED ? nullptr : static_cast<char*>(made);
  stack_count = stacks ? count : 0;
  return stacks;
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

cudaError_t run(int count, int threads, size_t shared, bool cooperative,
                const std::function<void()>& kernel) {
  failure.clear();
  if (count < 1 || threads < 1 || threads > kMaxThreads || threads % 32 || shared > kMaxShared)
    return cudaErrorInvalidConfiguration;
  if (cooperative && count > multiprocessors) return cudaErrorCooperativeLaunchTooLarge;
  if (!make_stacks(size_t(threads) * (cooperative ? count : 1))) return cudaErrorMemoryAllocation;
  body = &kernel;
  thread_count = threads;
  dynamic_bytes = shared;
  is_cooperative = cooperative;
  block_size.x = unsigned(threads);
  grid_size.x = unsigned(count);
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule >= 2)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
  const int together = cooperative ? count : 1;
  for (int first = 0; first < count && failure.empty(); first += together)
    run_blocks(order.data() + first, together);
  blocks.clear();
  return failure.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

void wait_for_block() {
  self().wait = Wait::block;
  yield();
}

void wait_for_grid() {
  if (!is_cooperative) fault("a grid barrier in a launch that is not cooperative");
  self().wait = Wait::grid;
  yield();
}

Device device() { return {multiprocessors, kMaxShared}; }
int resident_blocks(size_t shared) {
  return most_resident >= 0 ? most_resident : shared <= kMaxShared ? multiprocessors : 0;
}
void set_multiprocessors(int count) { multiprocessors = count; }

const uint64_t* exchange(const char* operation, unsigned mask, uint64_t value) {
  Fiber& self = now->fibers[running];
  if (!(mask >> running % 32 & 1)) fault(std::string(operation) + " by a lane that is not in its mask");
  self.wait = Wait::warp;
  self.operation = operation;
  self.mask = mask;
  self.given = value;
  yield();
  return self.values;
}

void* shared_memory(const void* key, size_t bytes) {
  Memory& found = now->memory[key];
  if (!found) found = poisoned(bytes);
  return found.get();
}

unsigned char* dynamic_shared_memory() {
  const auto found = now->memory.find(nullptr);
  if (found == now->memory.end()) fault("a kernel without dynamic shared memory asks for it");
  return found->second.get();
}

void copy_async(void* shared, const void* global) {
  check_copy(shared, global, 16);
  const Copy copy{shared, global, 16, nullptr};
  if (schedule % 2) complete(copy);
  self().groups.back().push_back(copy);
}

void commit_copies() { self().groups.emplace_back(); }

void wait_copies(int newest) {
  auto& groups = self().groups;
  while (int(groups.size()) - 1 > newest) {
    if (schedule % 2 == 0)
      for (const Copy& copy : groups.front()) complete(copy);
    groups.erase(groups.begin());
  }
}

void init_barrier(uint64_t* barrier, int arrivals) { now->barriers[barrier] = {arrivals, arrivals, 0, 0}; }

void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  if (!now->barriers.count(barrier)) fault("a barrier is used before it was made");
  count(*now, barrier, 1, bytes);
}

void wait_barrier(uint64_t* barrier, uint32_t parity) {
  if (!now->barriers.count(barrier)) fault("a barrier is used before it was made");
  if (now->barriers[barrier].phase % 2 != parity) return;
  Fiber& self = now->fibers[running];
  self.wait = Wait::barrier;
  self.barrier = barrier;
  self.parity = parity;
  yield();
}

void copy_bulk(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  check_copy(shared, global, bytes);
  if (!now->barriers.count(barrier)) fault("a barrier is used before it was made");
  now->in_flight.push_back({shared, global, bytes, barrier});
  if (schedule % 2) arrive_one(*now);
}

}  // namespace emulator

extern "C" {
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emulator::failure.c_str();
  if (error == cudaErrorCooperativeLaunchTooLarge) return "too many blocks in cooperative launch";
  return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "CUDA error";
}

// For Python: which order threads, blocks and copies come in.
__attribute__((visibility("default"))) void emulator_set_schedule(unsigned schedule) {
  emulator::set_schedule(schedule);
}
// How many there are, a block on each; how many blocks fit after all (another process has the others), -1:
// all.
__attribute__((visibility("default"))) void emulator_set_multiprocessors(int count) {
  emulator::set_multiprocessors(count);
}
__attribute__((visibility("default"))) void emulator_set_resident_blocks(int count) {
  emulator::most_resident = count;
}
}
