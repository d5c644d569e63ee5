#include "simt.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "../cuda/cuda_error.h"

namespace helexa::simt {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr uint16_t kNobody = 0, kSeveral = 0xffff;  // threads and warps are counted from 1 in shadows

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kLeft };

// Who touched a byte of shared memory last, and when: the barriers that its block and its warp had passed.
struct Touch {
  uint16_t thread = kNobody, warp = kNobody;
  uint32_t block_epoch = 0, warp_epoch = 0;
};
struct Shadow {
  Touch write, read;
  bool atomic = false, in_flight = false;
};

struct PendingCopy {
  size_t offset, size;
  unsigned char bytes[16];
  int group;
};

struct Fiber {
  Thread thread;
  State state = State::kReady;
  int line = 0;  // of what it waits at
  bool started = false;
  jmp_buf place;
  ucontext_t entry;
  std::vector<PendingCopy> copies;
  int open_group = 0;
};

struct Warp {
  uint32_t epoch = 0;
  int arrived = 0, line = 0, generation = 0;
  std::array<std::array<unsigned char, kWarpSize * 64>, 2> deposits;
};

struct Launch {
  const std::function<void()>* body;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Shadow> shadows;
  uint32_t block_epoch = 0;
  int arrived = 0;
  Fiber* running = nullptr;
  pthread_t owner = pthread_self();
  std::string failure;
  jmp_buf scheduler;
  sigjmp_buf faulted;
};

Launch* launch = nullptr;
unsigned thread_order = 0;
struct {
  int code = 0, after = 0;
  bool sticks = false;
} failing;  // as fail_launches says
std::mutex one_launch;

// Stacks outlive a launch: a thousand mappings for each would cost more than the kernels.
unsigned char* stack_of(size_t fiber) {
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= fiber) {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, size_t(sysconf(_SC_PAGESIZE)), PROT_NONE);  // an overflow is a fault, not a neighbour's stack
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[fiber];
}

std::string where(const Fiber& fiber) {
  const auto text = [](const dim3& at) {
    return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
  };
  return "block " + text(fiber.thread.block) + ", thread " + text(fiber.thread.index);
}

// Back to the scheduler; it returns here when the thread may go on.
void wait() {
  if (_setjmp(launch->running->place) == 0) _longjmp(launch->scheduler, 1);
}

void enter() {
  (*launch->body)();
  if (!launch->running->copies.empty()) fault("leaves the kernel with an asynchronous copy under way");
  launch->running->state = State::kLeft;
  _longjmp(launch->scheduler, 1);
}

Warp& own_warp() { return launch->warps[size_t(launch->running->thread.linear / kWarpSize)]; }

void release(State waiting, size_t first, size_t count) {
  for (size_t i = first; i < first + count; ++i)
    if (launch->fibers[i].state == waiting) launch->fibers[i].state = State::kReady;
}

[[noreturn]] void fault_between(const Fiber& other, const std::string& what) {
  fault(what + "; thread " + std::to_string(other.thread.linear) + " of the block: " +
        (other.state == State::kLeft ? "has left the kernel" : "waits at line " + std::to_string(other.line)));
}

// The running thread is the last of `count` at a meeting. Nobody may be missing or be elsewhere.
void check_meeting(size_t first, size_t count, State waiting, int line, const char* name) {
  for (size_t i = first; i < first + count; ++i) {
    const Fiber& other = launch->fibers[i];
    if (&other != launch->running && (other.state != waiting || other.line != line))
      fault_between(other, std::string(name) + " at line " + std::to_string(line) + " that not all threads reach");
  }
}

bool ordered(const Touch& touch) {
  const Fiber& me = *launch->running;
  if (touch.thread == kNobody || touch.thread == me.thread.linear + 1) return true;
  if (touch.block_epoch < launch->block_epoch) return true;
  const int warp = me.thread.linear / kWarpSize + 1;
  return touch.warp == warp && touch.warp_epoch < launch->warps[size_t(warp - 1)].epoch;
}

Touch now() {
  const int linear = launch->running->thread.linear, warp = linear / kWarpSize;
  return {uint16_t(linear + 1), uint16_t(warp + 1), launch->block_epoch, launch->warps[size_t(warp)].epoch};
}

std::string byte_of(size_t offset, const Touch& by) {
  const std::string who = by.thread == kSeveral ? "several threads" : "thread " + std::to_string(by.thread - 1);
  return "shared byte " + std::to_string(offset) + ", touched by " + who + " since the last barrier";
}

// Lets a thread run until it waits, leaves or fails.
void take_turn(Fiber& fiber) {
  launch->running = &fiber;
  if (_setjmp(launch->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = stack_of(size_t(fiber.thread.linear));
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, enter, 0);
  setcontext(&fiber.entry);
}

void run_block(dim3 block, dim3 block_size, dim3 grid, const std::vector<size_t>& order) {
  Launch& l = *launch;
  std::fill(l.shared.begin(), l.shared.end(), 0xff);
  std::fill(l.shadows.begin(), l.shadows.end(), Shadow{});
  l.block_epoch = 1, l.arrived = 0;
  for (Warp& warp : l.warps) warp.epoch = 1, warp.arrived = 0;
  for (size_t i = 0; i < l.fibers.size(); ++i) {
    Fiber& fiber = l.fibers[i];
    const unsigned n = unsigned(i);
    fiber.thread.index = dim3(n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y);
    fiber.thread.block = block, fiber.thread.block_size = block_size, fiber.thread.grid_size = grid;
    fiber.thread.linear = int(i);
    fiber.state = State::kReady, fiber.started = false, fiber.copies.clear(), fiber.open_group = 0;
  }
  for (size_t left = l.fibers.size(); left > 0;) {
    bool advanced = false;
    for (const size_t i : order) {
      Fiber& fiber = l.fibers[i];
      if (fiber.state != State::kReady) continue;
      advanced = true;
      take_turn(fiber);
      if (!l.failure.empty()) return;
      if (fiber.state == State::kLeft) --left;
    }
    if (advanced) continue;
    const auto waiting =
        std::find_if(l.fibers.begin(), l.fibers.end(), [](const Fiber& f) { return f.state != State::kLeft; });
    l.failure = where(*waiting) + ": waits at line " + std::to_string(waiting->line) + " for threads that never come";
    const auto gone = std::find_if(l.fibers.begin(), l.fibers.end(),
                                   [&](const Fiber& f) { return f.state == State::kLeft || f.line != waiting->line; });
    if (gone != l.fibers.end())
      l.failure += gone->state == State::kLeft
                       ? "; thread " + std::to_string(gone->thread.linear) + " of the block has left the kernel"
                       : "; thread " + std::to_string(gone->thread.linear) + " of the block waits at line " +
                             std::to_string(gone->line);
    return;
  }
}

void on_segmentation_fault(int number, siginfo_t* info, void*) {
  if (!pthread_equal(launch->owner, pthread_self())) {  // not a kernel's: the process ends as it would have
    signal(number, SIG_DFL);
    return;
  }
  char text[96];
  snprintf(text, sizeof text, ": access outside of a global buffer, at address %p", info->si_addr);
  launch->failure = where(*launch->running) + text;
  siglongjmp(launch->faulted, 1);
}

// Takes segmentation faults while a kernel runs, on a stack of its own.
class FaultHandler {
 public:
  FaultHandler() {
    static std::vector<unsigned char> stack(64 << 10);
    stack_t ours{};
    ours.ss_sp = stack.data(), ours.ss_size = stack.size();
    sigaltstack(&ours, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_segmentation_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &segv_before_);
    sigaction(SIGBUS, &action, &bus_before_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &segv_before_, nullptr);
    sigaction(SIGBUS, &bus_before_, nullptr);
    if (!(stack_before_.ss_flags & SS_ONSTACK)) sigaltstack(&stack_before_, nullptr);
  }

 private:
  struct sigaction segv_before_{}, bus_before_{};
  stack_t stack_before_{};
};

void run_grid(dim3 grid, dim3 block) {
  std::vector<size_t> order(launch->fibers.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (thread_order == 1) std::reverse(order.begin(), order.end());
  if (thread_order > 1) std::shuffle(order.begin(), order.end(), std::mt19937(thread_order));
  FaultHandler handler;
  if (sigsetjmp(launch->faulted, 1) == 0)
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x && launch->failure.empty(); ++x) run_block(dim3(x, y, z), block, grid, order);
  launch->running = nullptr;
}

}  // namespace

const Thread& thread() { return launch->running->thread; }

void set_thread_order(unsigned order) { thread_order = order; }

void fail_launches(int code, int after, bool sticks) { failing = {code, after, sticks}; }

void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  const auto invalid = [&](const std::string& what) { throw std::runtime_error(std::string(kernel) + ": " + what); };
  if (threads == 0 || threads > 1024 || threads % kWarpSize)
    invalid("expected a block of 32 to 1024 threads, whole warps, got " + std::to_string(threads));
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
    invalid("expected a grid of 1 to 65535 blocks in y and z, got none or more");
  if (shared_bytes > 227 << 10)
    invalid("expected at most 227 KiB of shared memory, got " + std::to_string(shared_bytes));
  const std::lock_guard<std::mutex> lock(one_launch);
  if (failing.code && failing.after-- <= 0) {
    const int code = failing.code;
    if (!failing.sticks) failing = {};
    throw cuda::CudaError(code, std::string(kernel) + ": CUDA error " + std::to_string(code) + ", as the test wants");
  }
  const auto owned = std::make_unique<Launch>();
  owned->body = &body;
  owned->fibers.resize(threads), owned->warps.resize(threads / kWarpSize);
  owned->shared.resize(shared_bytes), owned->shadows.resize(shared_bytes);
  launch = owned.get();
  run_grid(grid, block);
  launch = nullptr;
  if (!owned->failure.empty()) throw std::runtime_error(std::string(kernel) + ": " + owned->failure);
}

void fault(const std::string& what) {
  launch->failure = where(*launch->running) + ": " + what;
  _longjmp(launch->scheduler, 1);
}

void block_barrier(int line) {
  Fiber& me = *launch->running;
  me.line = line;
  if (++launch->arrived < int(launch->fibers.size())) {
    me.state = State::kAtBlockBarrier;
    wait();
    return;
  }
  check_meeting(0, launch->fibers.size(), State::kAtBlockBarrier, line, "a barrier");
  launch->arrived = 0;
  ++launch->block_epoch;
  for (Warp& warp : launch->warps) ++warp.epoch;
  release(State::kAtBlockBarrier, 0, launch->fibers.size());
}

namespace {

// All lanes of the running warp meet here; lane l's deposit lies l * 64 bytes behind what is returned.
const unsigned char* meet(const void* mine, size_t size, int line, bool orders_memory) {
  Fiber& me = *launch->running;
  Warp& warp = own_warp();
  const size_t lane = size_t(me.thread.linear % kWarpSize), first = size_t(me.thread.linear) - lane;
  // Two sets in turn: nobody can deposit again in this one before every lane has passed the next meeting.
  auto& deposits = warp.deposits[size_t(warp.generation & 1)];
  if (size > 0) std::memcpy(deposits.data() + lane * 64, mine, size);
  me.line = line;
  if (++warp.arrived < kWarpSize) {
    me.state = State::kAtWarpBarrier;
    wait();
  } else {
    check_meeting(first, kWarpSize, State::kAtWarpBarrier, line, "a warp operation");
    warp.arrived = 0;
    ++warp.generation;
    if (orders_memory) ++warp.epoch;
    release(State::kAtWarpBarrier, first, kWarpSize);
  }
  return deposits.data();
}

}  // namespace

const unsigned char* warp_exchange(const void* mine, size_t size, int line) { return meet(mine, size, line, false); }

void warp_barrier(int line) { meet(nullptr, 0, line, true); }

size_t shared_size() { return launch->shared.size(); }
unsigned char* shared_bytes(size_t offset) { return launch->shared.data() + offset; }

void check_shared_read(size_t offset, size_t size) {
  const Touch me = now();
  for (size_t i = offset; i < offset + size; ++i) {
    Shadow& shadow = launch->shadows[i];
    if (shadow.in_flight)
      fault("reads shared byte " + std::to_string(i) + " while an asynchronous copy to it is under way");
    if (shadow.write.thread == kNobody) fault("reads shared byte " + std::to_string(i) + ", which nobody has written");
    if (!ordered(shadow.write)) fault("reads " + byte_of(i, shadow.write));
    Touch& read = shadow.read;
    if (read.thread == kNobody || read.block_epoch < me.block_epoch ||
        (read.warp == me.warp && read.warp_epoch < me.warp_epoch)) {
      read = me;
    } else {
      if (read.thread != me.thread) read.thread = kSeveral;
      if (read.warp != me.warp) read.warp = kSeveral;
      read.warp_epoch = std::max(read.warp_epoch, me.warp_epoch);
    }
  }
}

void check_shared_write(size_t offset, size_t size, bool atomic) {
  for (size_t i = offset; i < offset + size; ++i) {
    Shadow& shadow = launch->shadows[i];
    if (shadow.in_flight)
      fault("writes shared byte " + std::to_string(i) + " while an asynchronous copy to it is under way");
    if (atomic && shadow.write.thread == kNobody)
      fault("adds to shared byte " + std::to_string(i) + ", which nobody has written");
    if (!ordered(shadow.write) && !(atomic && shadow.atomic)) fault("writes " + byte_of(i, shadow.write));
    if (!ordered(shadow.read)) fault("writes " + byte_of(i, shadow.read));
    shadow.write = now();
    shadow.atomic = atomic;
  }
}

void copy_async(size_t offset, const void* source, size_t size) {
  Fiber& me = *launch->running;
  check_shared_write(offset, size);
  PendingCopy copy{offset, size, {}, me.open_group};
  std::memcpy(copy.bytes, source, size);
  for (size_t i = offset; i < offset + size; ++i) launch->shadows[i].in_flight = true;
  me.copies.push_back(copy);
}

void copy_async_commit() { ++launch->running->open_group; }

void copy_async_wait(int groups_left) {
  Fiber& me = *launch->running;
  const auto due = [&](const PendingCopy& copy) { return copy.group < me.open_group - groups_left; };
  for (const PendingCopy& copy : me.copies) {
    if (!due(copy)) continue;
    std::memcpy(launch->shared.data() + copy.offset, copy.bytes, copy.size);
    for (size_t i = copy.offset; i < copy.offset + copy.size; ++i) {
      launch->shadows[i].in_flight = false;
      launch->shadows[i].write = now();
    }
  }
  me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), due), me.copies.end());
}

Guarded::Guarded(size_t size, bool at_front) : size_(size) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), rounded = (size + 15) / 16 * 16;
  const size_t inner = (rounded + page - 1) / page * page;
  mapped_ = inner + 2 * page;
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(memory);
  std::memset(mapping_ + page, 0xff, inner);
  mprotect(mapping_, page, PROT_NONE);
  mprotect(mapping_ + page + inner, page, PROT_NONE);
  data_ = mapping_ + page + (at_front ? 0 : inner - rounded);
}

Guarded::~Guarded() { munmap(mapping_, mapped_); }

}  // namespace helexa::simt
