// How work is shared between torch's threads: layer by layer, or one team for a whole network.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "../stable.h"
#include "isa.h"

namespace resnet_fast::cpu {

// `total` cut into `parts` pieces that differ by one at most. It divides once, for all pieces.
struct Cut {
  int64_t each, left;
  Cut(int64_t total, int64_t parts) : each(total / parts), left(total % parts) {}
  // The first element of piece `i`.
  int64_t at(int64_t i) const { return each * i + std::min(i, left); }
};

inline int64_t cut_at(int64_t total, int64_t parts, int64_t i) { return Cut(total, parts).at(i); }

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// What the threads of a team do besides, a little after each task.
class Errand {
 public:
  virtual void go_on(int64_t rank) = 0;

 protected:
  ~Errand() = default;
};

// Threads that stay together for many layers. One drives; the others help with whatever is being
// shared. A fork and a join a layer costs microseconds each, and where another process keeps a core
// busy, a join waits for a thread that has not even begun. Here the driver takes over what a helper
// has not begun, and waits only for what it is in the middle of.
//
// A helper that slept may be woken on the driver's own core, and waits there for the next balancing
// of the load behind a thread that never stops: measured at 2 to 9 ms, of a network that takes 4. A
// driver that misses a helper therefore sleeps for a moment, once, and a helper that finds itself
// on the driver's core leaves it.
class Team {
 public:
  // Calls drive() on one of torch's threads, with the others as helpers. drive must not throw. All
  // of them go on with the errand, if there is one.
  template <typename F>
  static void run(const F& drive, Errand* errand = nullptr) {
    const int64_t size = thread_count();
    Team team(size, errand);
    parallel_for(0, size, 1, [&](int64_t first, int64_t last) {
      if (first != 0) return team.help(first);
      // Torch may run it all in this thread; the helpers then find that it is over.
      if (last == size) team.misses_ = false;
      Team* const outer = current_;
      current_ = &team;
      drive();
      current_ = outer;
      team.turn_.store(kOver, std::memory_order_release);
    });
  }

  // The team that this thread drives, or null.
  static Team* current() { return current_; }

  int64_t size() const { return size_; }
  Errand* errand() const { return errand_; }

  // Calls work(0) here and work(rank) on each helper that comes while it runs. The work itself
  // says who does what: a helper may not come at all.
  template <typename F>
  void share(const F& work) {
    if (misses_) make_room();
    work_ = [](const void* context, int64_t rank) { (*static_cast<const F*>(context))(rank); };
    context_ = &work;
    turn_.store(++turns_, std::memory_order_seq_cst);
    work(int64_t(0));
    turn_.store(kClosed, std::memory_order_seq_cst);
    // A helper counts itself in before it looks whether the turn is still open; one of the two
    // sides therefore sees the other.
    while (busy_.load(std::memory_order_seq_cst) != 0) relax();
  }

 private:
  static constexpr uint64_t kClosed = 0, kOver = ~uint64_t(0);
  static constexpr int kSpins = 4096;  // then other processes may have the core
  // A helper on a core of its own wakes within 100 us.
  static constexpr std::chrono::microseconds kPatience{150};

  Team(int64_t size, Errand* errand) : size_(size), errand_(errand), misses_(size > 1) {}

  void make_room() {
    misses_ = come_.load(std::memory_order_relaxed) < size_ - 1;
    if (!misses_ || std::chrono::steady_clock::now() - begun_ < kPatience) return;
    misses_ = false;
    std::this_thread::sleep_for(std::chrono::nanoseconds(1));
  }

  // The mask is put back at once; the thread stays where it moved to.
  void leave_the_drivers_core() const {
#if defined(__linux__)
    cpu_set_t allowed;
    if (driver_core_ < 0 || sched_getcpu() != driver_core_) return;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) < size_) return;
    cpu_set_t others = allowed;
    CPU_CLR(driver_core_, &others);
    if (sched_setaffinity(0, sizeof(others), &others) == 0) {
      sched_setaffinity(0, sizeof(allowed), &allowed);
    }
#endif
  }

  void help(int64_t rank) {
    come_.fetch_add(1, std::memory_order_relaxed);
    leave_the_drivers_core();
    uint64_t done = kClosed;
    for (int spins = 0;; ++spins) {
      const uint64_t turn = turn_.load(std::memory_order_acquire);
      if (turn == kOver) return;
      if (turn == kClosed || turn == done) {
        if (spins < kSpins) {
          relax();
        } else {
          std::this_thread::yield();
        }
        continue;
      }
      busy_.fetch_add(1, std::memory_order_seq_cst);
      if (turn_.load(std::memory_order_seq_cst) == turn) {
        work_(context_, rank);
        done = turn;
      }
      busy_.fetch_sub(1, std::memory_order_release);
      spins = 0;
    }
  }

  static inline thread_local Team* current_ = nullptr;

  const int64_t size_;
  Errand* const errand_;
  const std::chrono::steady_clock::time_point begun_ = std::chrono::steady_clock::now();
  bool misses_;  // whether a helper may not have come yet
#if defined(__linux__)
  const int driver_core_ = sched_getcpu();
#endif
  uint64_t turns_ = 0;
  void (*work_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> turn_{kClosed};
  alignas(64) std::atomic<int64_t> busy_{0};
  std::atomic<int64_t> come_{0};
};

// While one lives, the kernels that this thread calls are parts of a task of its own, and are
// shared with nobody.
class Solo {
 public:
  Solo() : outer_(active_) { active_ = true; }
  ~Solo() { active_ = outer_; }
  Solo(const Solo&) = delete;
  Solo& operator=(const Solo&) = delete;
  static bool is_active() { return active_; }

 private:
  static inline thread_local bool active_ = false;
  const bool outer_;
};

// The threads that parallel_on uses.
inline int64_t worker_count() {
  if (Solo::is_active()) return 1;
  const Team* team = Team::current();
  return team != nullptr ? team->size() : thread_count();
}

// Runs f(begin, end) over parts of [0, tasks) on torch's threads, compiled for I. A thread starts
// on a range of its own, which is where it worked in the layer before, so that what it needs is in
// its cache. When done it takes over what the others have left: a core that something else keeps
// busy for a while would otherwise hold up every layer.
template <Isa I, typename F>
void parallel_on(int64_t tasks, const F& f) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end, step;
  };
  const int64_t threads = std::clamp<int64_t>(worker_count(), 1, std::max<int64_t>(tasks, 1));
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t begin = cut_at(tasks, threads, t), end = cut_at(tasks, threads, t + 1);
    ranges[t].next = begin;
    ranges[t].end = end;
    ranges[t].step = std::max<int64_t>(1, (end - begin) / 8);
  }
  Team* const team = Solo::is_active() ? nullptr : Team::current();
  Errand* const errand = team == nullptr ? nullptr : team->errand();
  const auto work = [&](int64_t rank) {
    run_on_isa([&](auto same) RF_INLINE {
      if constexpr (decltype(same)::value == I) {
        for (int64_t t = rank; t < rank + threads; ++t) {
          Range& range = ranges[t % threads];
          for (;;) {
            const int64_t begin = range.next.fetch_add(range.step, std::memory_order_relaxed);
            if (begin >= range.end) break;
            f(begin, std::min(range.end, begin + range.step));
            if (errand != nullptr) errand->go_on(rank);
          }
        }
      }
    });
  };
  if (Solo::is_active()) return work(0);
  if (team != nullptr) return team->share(work);
  parallel_for(0, threads, 1, [&](int64_t first, int64_t) { work(first); });
}

}  // namespace resnet_fast::cpu
