// Runs CUDA kernels on the CPU, for tests: the .cu files include this instead of CUDA's runtime.
//
// Each thread of a block is a fiber with a stack of its own. The scheduler lets a thread run until
// it waits (at a barrier, a shuffle, a matrix product) or ends, and picks the next one at random,
// so what only works in one order fails. Besides wrong numbers it reports, as an exception of the
// launch:
//   - an index outside an array (Array knows its bounds; it is a bare pointer under nvcc);
//   - a race: two threads touch one element, one of them writes and not both atomically, and no
//     barrier stands between (blocks of one launch are never ordered);
//   - divergence: threads that wait at different barriers, or for a thread that has ended;
//   - a shuffle that reads a lane outside its mask.
// Shared memory starts out as NaN. Blocks run one after the other, in a random order.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

struct Index {
  unsigned x;
};

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr int64_t kSharedBytes = 99 << 10;  // of a block, on the smallest GPU that sm_80's code runs on (sm_86)

struct Thread;
using Complete = void (*)(Thread* const* members, unsigned count);

struct Thread {
  Index index{};
  enum { ready, at_barrier, in_warp, done } state = ready;
  uint64_t warp_epoch = 0;
  // What it waits for.
  uint32_t mask = 0;
  Complete complete = nullptr;
  int line = 0;
  // What it brings to a collective operation of its warp, and what it takes away.
  alignas(16) unsigned char given[32], taken[32];
  int source = 0;
  // Its fiber.
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;
  bool started = false;

  unsigned lane() const { return index.x % kWarp; }
};

// Who touched an element, and when.
struct Access {
  uint32_t block = UINT32_MAX, thread = 0;
  uint64_t epoch = 0, warp_epoch = 0;
};

struct Cell {
  Access written, read;
  bool atomically = false, many_readers = false;
};

class Machine {
 public:
  std::vector<std::unique_ptr<Thread>> threads;
  Thread* current = nullptr;
  Index block{}, block_size{}, grid{};
  std::vector<char> shared;
  std::mt19937 random{1};

  static Machine& instance() {
    static Machine machine;
    return machine;
  }

  void launch(unsigned blocks, unsigned size, size_t shared_bytes, std::function<void()> kernel) {
    body_ = std::move(kernel);
    grid = {blocks};
    block_size = {size};
    global_.clear();
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      block = {i};
      shared.assign(shared_bytes, char(0xff));
      local_.clear();
      run_block(size);
    }
  }

  [[noreturn]] void fail(const std::string& what) {
    throw std::runtime_error("emulated kernel: block " + std::to_string(block.x) + ", thread " +
                             std::to_string(current->index.x) + ": " + what);
  }

  // Returns whether any thread of the block came with `says`.
  bool barrier(int line, bool says) {
    for (const auto& other : threads)
      if (other->state == Thread::at_barrier && other->line != line)
        fail("waits at the barrier of line " + std::to_string(line) + ", thread " + std::to_string(other->index.x) +
             " at that of line " + std::to_string(other->line));
    said_ |= says;
    if (++arrived_ == block_size.x) {
      arrived_ = 0;
      ++epoch_;
      all_said_ = said_;
      said_ = false;
      for (const auto& other : threads)
        if (other->state == Thread::at_barrier) wake(*other);
    } else {
      wait(Thread::at_barrier, line);
    }
    return all_said_;
  }

  // Waits until all lanes of the mask have come to the same operation; the last one completes it.
  void collective(uint32_t mask, Complete complete, int line) {
    if (!(mask >> current->lane() & 1)) fail("calls a warp operation whose mask leaves it out");
    current->mask = mask;
    current->complete = complete;
    Thread* members[kWarp];
    unsigned count = 0;
    const unsigned first = current->index.x / kWarp * kWarp;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= block_size.x) fail("names a lane that does not exist in a mask");
      Thread& other = *threads[first + lane];
      if (&other != current) {
        if (other.state != Thread::in_warp || other.mask != mask) return wait(Thread::in_warp, line);
        if (other.complete != complete || other.line != line)
          fail("line " + std::to_string(line) + ": lanes of one mask wait at different warp operations");
      }
      members[count++] = &other;
    }
    complete(members, count);
    for (unsigned i = 0; i < count; ++i)
      if (members[i] != current) wake(*members[i]);
  }

  void touch(const void* element, bool write, bool atomic) {
    const char* at = static_cast<const char*>(element);
    const bool local = at >= shared.data() && at < shared.data() + shared.size();
    Cell& cell = (local ? local_ : global_)[element];
    const Access now{block.x, current->index.x, epoch_, current->warp_epoch};
    if (!(atomic && cell.atomically) && !ordered(cell.written, now)) race(write, local);
    if (write) {
      if (cell.many_readers && !(cell.read.block == now.block && cell.read.epoch < now.epoch)) race(write, local);
      if (!ordered(cell.read, now)) race(write, local);
      cell.written = now;
      cell.atomically = atomic;
    } else {
      const bool same_phase = cell.read.block == now.block && cell.read.epoch == now.epoch;
      cell.many_readers = (cell.read.block != UINT32_MAX && cell.read.block != now.block) ||
                          (same_phase && (cell.many_readers || cell.read.thread / kWarp != now.thread / kWarp));
      cell.read = now;
    }
  }

 private:
  std::function<void()> body_;
  std::unordered_map<const void*, Cell> global_, local_;
  std::vector<Thread*> ready_;
  jmp_buf scheduler_;
  std::string error_;
  unsigned arrived_ = 0, live_ = 0;
  bool said_ = false, all_said_ = false;
  uint64_t epoch_ = 0;

  static bool ordered(const Access& before, const Access& now) {
    if (before.block == UINT32_MAX) return true;
    if (before.block != now.block) return false;
    return before.thread == now.thread || before.epoch < now.epoch ||
           (before.thread / kWarp == now.thread / kWarp && before.warp_epoch < now.warp_epoch);
  }

  [[noreturn]] void race(bool write, bool local) {
    fail(std::string("race: ") + (write ? "writes" : "reads") + " an element of " + (local ? "shared" : "global") +
         " memory that another thread touches, with no barrier between");
  }

  void wake(Thread& thread) {
    thread.state = Thread::ready;
    ready_.push_back(&thread);
  }

  void wait(decltype(Thread::state) state, int line) {
    current->state = state;
    current->line = line;
    suspend();
  }

  void suspend() {
    if (_setjmp(current->at) == 0) _longjmp(scheduler_, 1);
  }

  static void enter() {
    for (;;) {
      Machine& machine = instance();
      try {
        machine.body_();
      } catch (const std::exception& error) {
        machine.error_ = error.what();
      }
      machine.current->state = Thread::done;
      --machine.live_;
      machine.suspend();
    }
  }

  void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler_) != 0) return;
    if (thread.started) _longjmp(thread.at, 1);
    thread.started = true;
    setcontext(&thread.start);
  }

  void prepare(unsigned size) {
    while (threads.size() < size) {
      auto thread = std::make_unique<Thread>();
      thread->index = {unsigned(threads.size())};
      thread->stack.reset(new char[kStack]);
      getcontext(&thread->start);
      thread->start.uc_stack.ss_sp = thread->stack.get();
      thread->start.uc_stack.ss_size = kStack;
      thread->start.uc_link = nullptr;
      makecontext(&thread->start, &Machine::enter, 0);
      threads.push_back(std::move(thread));
    }
  }

  void run_block(unsigned size) {
    prepare(size);
    ready_.clear();
    arrived_ = 0;
    said_ = false;
    live_ = size;
    ++epoch_;
    for (unsigned i = 0; i < size; ++i) wake(*threads[i]);
    while (live_ && error_.empty()) {
      if (ready_.empty()) {
        error_ = stuck(size);
        break;
      }
      std::swap(ready_[random() % ready_.size()], ready_.back());
      Thread* next = ready_.back();
      ready_.pop_back();
      resume(*next);
    }
    if (error_.empty()) return;
    threads.clear();  // fibers that stopped half-way
    throw std::runtime_error(std::exchange(error_, ""));
  }

  std::string stuck(unsigned size) const {
    std::string what = "emulated kernel: block " + std::to_string(block.x) + " is stuck:";
    unsigned done = 0, listed = 0;
    for (unsigned i = 0; i < size; ++i) {
      const Thread& thread = *threads[i];
      done += thread.state == Thread::done;
      if (thread.state == Thread::done || listed++ > 3) continue;
      what += " thread " + std::to_string(i) + " waits at line " + std::to_string(thread.line) + ";";
    }
    return what + " " + std::to_string(done) + " threads have ended";
  }
};

inline Machine& machine() { return Machine::instance(); }

// A reference to an element: reads and writes go through the machine.
template <typename T>
class Element {
 public:
  explicit Element(T* at) : at_(at) {}
  operator T() const {
    machine().touch(at_, false, false);
    return *at_;
  }
  T operator=(T value) const {
    machine().touch(at_, true, false);
    return *at_ = value;
  }
  T operator=(const Element& other) const { return *this = T(other); }
  T operator+=(T value) const { return *this = T(*this) + value; }

 private:
  T* at_;
};

}  // namespace emulation

// A pointer that knows its bounds; what can only be read needs no watching.
template <typename T>
class Array {
 public:
  Array() = default;
  Array(T* at, T* begin, T* end) : at_(at), begin_(begin), end_(end) {}
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T> && !std::is_same_v<U, T>>>
  Array(const Array<U>& other) : at_(other.at_), begin_(other.begin_), end_(other.end_) {}

  auto operator[](int64_t i) const {
    if constexpr (std::is_const_v<T>) {
      return *checked(i, 1);
    } else {
      return emulation::Element<T>(checked(i, 1));
    }
  }
  Array operator+(int64_t n) const { return {at_ + n, begin_, end_}; }
  explicit operator bool() const { return at_ != nullptr; }

  // The address of n elements from i on, all of them inside.
  T* checked(int64_t i, int64_t n) const {
    if (at_ == nullptr || at_ + i < begin_ || at_ + i + n > end_)
      emulation::machine().fail("index " + std::to_string((at_ - begin_) + i) + " of an array of " +
                                std::to_string(end_ - begin_));
    return at_ + i;
  }

 private:
  template <typename U>
  friend class Array;
  T *at_ = nullptr, *begin_ = nullptr, *end_ = nullptr;
};

template <typename T>
Array<T> array(T* from, int64_t count) {
  return {from, from, from == nullptr ? from : from + count};
}

template <typename T>
Array<T> shared_array(int64_t offset_bytes, int64_t count) {
  auto& memory = emulation::machine().shared;
  T* from = reinterpret_cast<T*>(memory.data() + offset_bytes);
  if (offset_bytes + count * int64_t(sizeof(T)) > int64_t(memory.size()))
    emulation::machine().fail("asks for more shared memory than the launch gave");
  return array(from, count);
}

#define threadIdx (::emulation::machine().current->index)
#define blockIdx (::emulation::machine().block)
#define blockDim (::emulation::machine().block_size)
#define gridDim (::emulation::machine().grid)

inline void __syncthreads(int line = __builtin_LINE()) { emulation::machine().barrier(line, false); }

inline bool any_thread(bool says, int line = __builtin_LINE()) { return emulation::machine().barrier(line, says); }

inline void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) {
  emulation::machine().collective(
      mask,
      [](emulation::Thread* const* members, unsigned count) {
        uint64_t latest = 0;
        for (unsigned i = 0; i < count; ++i) latest = std::max(latest, members[i]->warp_epoch);
        for (unsigned i = 0; i < count; ++i) members[i]->warp_epoch = latest + 1;
      },
      line);
}

// `source` is a lane of the warp.
template <typename T>
T shuffle(uint32_t mask, T value, int source, int line = __builtin_LINE()) {
  emulation::Thread& self = *emulation::machine().current;
  static_assert(sizeof(T) <= sizeof(self.given), "too large to shuffle");
  std::memcpy(self.given, &value, sizeof(T));
  self.source = source;
  if (!(mask >> source & 1)) emulation::machine().fail("shuffles from a lane outside its mask");
  emulation::machine().collective(
      mask,
      [](emulation::Thread* const* members, unsigned count) {
        for (unsigned i = 0; i < count; ++i)
          for (unsigned j = 0; j < count; ++j)
            if (int(members[j]->lane()) == members[i]->source)
              std::memcpy(members[i]->taken, members[j]->given, sizeof(T));
      },
      line);
  std::memcpy(&value, self.taken, sizeof(T));
  return value;
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate, int line = __builtin_LINE()) {
  emulation::Thread& self = *emulation::machine().current;
  self.given[0] = predicate;
  emulation::machine().collective(
      mask,
      [](emulation::Thread* const* members, unsigned count) {
        uint32_t bits = 0;
        for (unsigned i = 0; i < count; ++i) bits |= uint32_t(members[i]->given[0]) << members[i]->lane();
        for (unsigned i = 0; i < count; ++i) std::memcpy(members[i]->taken, &bits, sizeof(bits));
      },
      line);
  uint32_t bits;
  std::memcpy(&bits, self.taken, sizeof(bits));
  return bits;
}

template <typename T>
void atomic_add(Array<T> to, int64_t i, T value) {
  T* at = to.checked(i, 1);
  emulation::machine().touch(at, true, true);
  *at += value;
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// N adjacent elements, aligned to their size.
template <int N, typename T>
Vector<T, N> load_vector(Array<const T> from, int64_t i) {
  const T* at = from.checked(i, N);
  if (reinterpret_cast<uintptr_t>(at) % sizeof(Vector<T, N>))
    emulation::machine().fail("loads a vector from an address that is not aligned");
  Vector<T, N> out;
  std::memcpy(&out, at, sizeof(out));
  return out;
}

template <typename T>
uint32_t load_pair(Array<T> from, int64_t i) {
  if (reinterpret_cast<uintptr_t>(from.checked(i, 2)) % 4)
    emulation::machine().fail("loads a pair from an address that is not aligned");
  return uint32_t(T(from[i]).bits) | uint32_t(T(from[i + 1]).bits) << 16;
}

template <int N, typename T>
void store_vector(Array<T> to, int64_t i, const Vector<T, N>& from) {
  if (reinterpret_cast<uintptr_t>(to.checked(i, N)) % sizeof(from))
    emulation::machine().fail("stores a vector at an address that is not aligned");
  for (int n = 0; n < N; ++n) to[i + n] = from.at[n];
}

template <int N, typename A>
void atomic_add_vector(Array<A> to, int64_t i, const A* values) {
  constexpr int kTogether = sizeof(A) != 4 ? 1 : N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;
  if (reinterpret_cast<uintptr_t>(to.checked(i, N)) % (sizeof(A) * kTogether))
    emulation::machine().fail("adds a vector at an address that is not aligned");
  for (int n = 0; n < N; ++n) atomic_add(to, i + n, values[n]);
}

#include "matrix.h"

namespace mmi {

using Stream = void*;

template <typename... P, typename... Q>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, Stream, const Q&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("a kernel's launch: more than 2^31 blocks; split the batch");
  if (shared_bytes > emulation::kSharedBytes) throw std::runtime_error("a kernel's shared memory: too much");
  emulation::machine().launch(unsigned(blocks), unsigned(threads), size_t(shared_bytes), [&] { kernel(arguments...); });
}

template <typename T>
inline float to_arithmetic(T x) {
  return widen(x);
}
inline double to_arithmetic(double x) { return x; }

}  // namespace mmi
