// The threads of a block: who runs, who waits where, and the order in which they go on.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "language.h"

namespace cuda_on_host {

// ascending and descending let the first (last) warp run ahead until it waits for the block, and
// the lanes of a warp follow each other; shuffled draws who is next, at each collective the warp
// too.
enum class Order { ascending, descending, shuffled };

class Random {
 public:
  void seed(uint64_t seed) { state_ = seed; }
  // Of [0, n): splitmix64 (Steele, Lea, Flood 2014).
  uint64_t below(uint64_t n) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % n;
  }

 private:
  uint64_t state_ = 0;
};

// A cp.async under way: it reads its source when it lands.
struct Copy {
  uint32_t to;
  const void* from;  // null: zeros
  unsigned bytes;
  uint64_t group;
};

struct Thread {
  std::unique_ptr<Fiber> fiber;
  dim3 index;
  const char* waits_at = nullptr;
  void* operands = nullptr;  // of the instruction there
  std::vector<Copy> copies;  // in the order of their issue
  uint64_t committed = 0;    // groups
};

struct Warp {
  uint32_t runnable = 0, meeting = 0, at_barrier = 0, exited = 0;  // lanes
  const char* instruction = nullptr;                               // at which they meet
  uint32_t barriers = 0;                                           // passed so far
};

inline constexpr const char* kBlockBarrier = "sync_block";

inline const char* text(dim3 index) {
  static std::array<std::array<char, 48>, 4> lines;
  static unsigned next = 0;
  auto& line = lines[next++ % lines.size()];
  std::snprintf(line.data(), line.size(), "(%u, %u, %u)", index.x, index.y, index.z);
  return line.data();
}

class Schedule {
 public:
  Order order = Order::ascending;
  Random random;

  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned count = 0;     // threads in the block
  unsigned present = 0;   // the running thread
  uint32_t barriers = 1;  // of the block passed so far; every block begins with one

  Thread& thread() { return threads[present]; }
  Warp& warp() { return warps[present / kLanes]; }
  unsigned lane() const { return present % kLanes; }

  void run_block(void (*kernel)(void*), void* arguments) {
    kernel_ = kernel;
    arguments_ = arguments;
    start();
    in_kernel = true;
    go_on(host_);
    in_kernel = false;
  }

  // The lanes of a warp come together at `instruction`, where the last to come acts for all of
  // them, on pointers to their operands.
  template <typename Operands, typename Act>
  void meet(const char* instruction, Operands& operands, const Act& act) {
    Warp& mine = warp();
    const unsigned first = present - lane();
    if (mine.exited)
      fail("divergence", "%s needs all lanes of the warp, and lane %d %s", instruction,
           std::countr_zero(mine.exited),
           first + std::countr_zero(mine.exited) < count ? "has exited" : "does not exist");
    if (mine.meeting && std::strcmp(mine.instruction, instruction) != 0)
      fail("divergence", "%s, and lane %d of the warp is at %s", instruction,
           std::countr_zero(mine.meeting), mine.instruction);
    mine.instruction = instruction;
    wait(mine.meeting, instruction, &operands);
    if (mine.meeting == ~0u) {
      std::array<Operands*, kLanes> all;
      for (unsigned l = 0; l < kLanes; ++l)
        all[l] = static_cast<Operands*>(threads[first + l].operands);
      act(all);
      release(mine.meeting, mine);
    }
    go_on(*thread().fiber);
  }

  void sync_warp() {
    int nothing = 0;
    meet("sync_warp", nothing, [this](const auto&) { ++warp().barriers; });
  }

  void sync_block() {
    if (exited_ > 0)
      fail("barrier", "%s needs all threads of the block, and thread %s has exited", kBlockBarrier,
           text(first_of(&Warp::exited)));
    wait(warp().at_barrier, kBlockBarrier, nullptr);
    if (++at_barrier_ == count) {
      at_barrier_ = 0;
      ++barriers;
      for (Warp& each : warps) release(each.at_barrier, each);
    }
    go_on(*thread().fiber);
  }

  // Lets another thread go first, where the order is drawn.
  void yield() {
    if (order == Order::shuffled) go_on(*thread().fiber);
  }

  // A permutation of 0 .. n - 1 in the order asked for.
  std::vector<uint64_t> permutation(uint64_t n) {
    std::vector<uint64_t> all(n);
    for (uint64_t i = 0; i < n; ++i) all[i] = order == Order::descending ? n - 1 - i : i;
    if (order == Order::shuffled)
      for (uint64_t i = n; i > 1; --i) std::swap(all[i - 1], all[random.below(i)]);
    return all;
  }

 private:
  void start() {
    count = static_cast<unsigned>(blockDim.count());
    const unsigned lanes = (count + kLanes - 1) / kLanes * kLanes;
    while (threads.size() < lanes) threads.emplace_back();
    warps.assign(lanes / kLanes, Warp{});
    for (unsigned t = 0; t < lanes; ++t) {
      Thread& it = threads[t];
      if (t < count && !it.fiber) it.fiber = std::make_unique<Fiber>(&Schedule::life);
      it.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
      it.committed = 0;
      Warp& warp = warps[t / kLanes];
      (t < count ? warp.runnable : warp.exited) |= 1u << t % kLanes;
    }
    exited_ = at_barrier_ = 0;
    current_ = kNone;
    ++barriers;
  }

  static void life();

  // From the running fiber to whose turn it is; to the host when all threads have exited.
  void go_on(Fiber& from) {
    if (exited_ == count) return from.switch_to(host_);
    const unsigned warp = next_warp();
    present = warp * kLanes + next_lane(warps[warp].runnable);
    threadIdx = thread().index;
    from.switch_to(*thread().fiber);
  }

  void exit() {
    if (!thread().copies.empty())
      fail("copies", "the thread exits and has not waited for %zu of its copies",
           thread().copies.size());
    Warp& mine = warp();
    if (mine.meeting)
      fail("divergence", "the thread exits, and lane %d of its warp waits at %s",
           std::countr_zero(mine.meeting), mine.instruction);
    if (at_barrier_ > 0)
      fail("barrier", "the thread exits, and thread %s waits at %s",
           text(first_of(&Warp::at_barrier)), kBlockBarrier);
    mine.runnable &= ~(1u << lane());
    mine.exited |= 1u << lane();
    ++exited_;
  }

  void wait(uint32_t& lanes, const char* where, void* operands) {
    thread().waits_at = where;
    thread().operands = operands;
    warp().runnable &= ~(1u << lane());
    lanes |= 1u << lane();
  }

  void release(uint32_t& lanes, Warp& warp) {
    warp.runnable |= lanes;
    lanes = 0;
    current_ = kNone;
  }

  unsigned next_warp() {
    const auto ready = [this](unsigned w) { return warps[w].runnable != 0; };
    const unsigned n = static_cast<unsigned>(warps.size());
    if (order == Order::shuffled) {
      if (current_ != kNone && ready(current_)) return current_;
      std::vector<unsigned> all;
      for (unsigned w = 0; w < n; ++w)
        if (ready(w)) all.push_back(w);
      if (all.empty()) deadlock();
      return current_ = all[random.below(all.size())];
    }
    for (unsigned i = 0; i < n; ++i) {
      const unsigned w = order == Order::ascending ? i : n - 1 - i;
      if (ready(w)) return w;
    }
    deadlock();
  }

  unsigned next_lane(uint32_t runnable) {
    if (order == Order::ascending) return static_cast<unsigned>(std::countr_zero(runnable));
    if (order == Order::descending) return 31 - static_cast<unsigned>(std::countl_zero(runnable));
    for (auto skip = random.below(static_cast<unsigned>(std::popcount(runnable))); skip; --skip)
      runnable &= runnable - 1;
    return static_cast<unsigned>(std::countr_zero(runnable));
  }

  // The first thread of which the warps' `lanes` tell.
  dim3 first_of(uint32_t Warp::* lanes) const {
    unsigned t = 0;
    while (!(warps[t / kLanes].*lanes >> t % kLanes & 1)) ++t;
    return threads[t].index;
  }

  const char* place(unsigned t) const {
    const bool gone = warps[t / kLanes].exited >> t % kLanes & 1;
    return gone ? "the end" : threads[t].waits_at;
  }

  [[noreturn]] void deadlock() const {
    std::string who;
    for (unsigned t = 0, end; t < count; t = end) {
      for (end = t + 1; end < count && std::strcmp(place(end), place(t)) == 0;) ++end;
      who += (t == 0 ? "threads " : ", threads ") + std::to_string(t) + " to " +
             std::to_string(end - 1) + " at " + place(t);
    }
    fail("deadlock", "everybody waits: %s", who.c_str());
  }

  static constexpr unsigned kNone = ~0u;
  Fiber host_;
  void (*kernel_)(void*) = nullptr;
  void* arguments_ = nullptr;
  unsigned exited_ = 0, at_barrier_ = 0, current_ = kNone;
};

inline Schedule schedule;

inline void Schedule::life() {
  for (;;) {
    schedule.kernel_(schedule.arguments_);
    schedule.exit();
    schedule.go_on(*schedule.thread().fiber);
  }
}

}  // namespace cuda_on_host
