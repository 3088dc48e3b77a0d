// Who has touched which memory since which barrier: two accesses of different threads, one of them
// a write, must be in order.
//
// In order are accesses of one thread, of a block that has passed a barrier between them, of a warp
// that has, and of different launches. Blocks are ordered by what a last block does: the writer's
// side fences and then adds to an atomic, the reader's side adds to the same and then fences.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "language.h"
#include "schedule.h"

namespace cuda_on_host {

// A thread's place in the order of its block.
struct Moment {
  unsigned thread;
  uint32_t barriers, warp_barriers;

  static Moment now(unsigned thread) {
    return {thread, schedule.barriers, schedule.warps[thread / kLanes].barriers};
  }
  bool before(const Moment& later) const {
    return thread == later.thread || barriers < later.barriers ||
           (thread / kLanes == later.thread / kLanes && warp_barriers < later.warp_barriers);
  }
};

// The fences and atomics of a launch's blocks, in the order in which they ran.
class Handovers {
 public:
  void start_launch() { blocks_.clear(); }
  void start_block() { blocks_.push_back({schedule.barriers + 1, {}}); }
  void fence() { add(nullptr); }
  void atomic(const void* address) { add(address); }

  bool in_launch(uint32_t barriers) const { return barriers >= blocks_.front().first_barrier; }
  bool in_block(uint32_t barriers) const { return barriers >= blocks_.back().first_barrier; }

  // Whether an earlier block handed over to the present one between two of their accesses.
  bool between(const Moment& from, const Moment& to) const {
    size_t block = blocks_.size() - 1;
    while (blocks_[block].first_barrier > from.barriers) --block;
    const auto& giver = blocks_[block].events;
    for (size_t f = 0; f < giver.size(); ++f) {
      if (giver[f].atomic || !from.before(giver[f].at)) continue;
      for (size_t a = f + 1; a < giver.size(); ++a)
        if (giver[a].atomic && giver[f].at.before(giver[a].at) && taken(giver[a].atomic, to))
          return true;
    }
    return false;
  }

 private:
  struct Event {
    Moment at;
    const void* atomic;  // null: a fence
  };
  struct Block {
    uint32_t first_barrier;
    std::vector<Event> events;
  };

  void add(const void* atomic) {
    blocks_.back().events.push_back({Moment::now(schedule.present), atomic});
  }
  bool taken(const void* atomic, const Moment& to) const {
    const auto& events = blocks_.back().events;
    for (size_t a = 0; a < events.size(); ++a) {
      if (events[a].atomic != atomic) continue;
      for (size_t f = a + 1; f < events.size(); ++f)
        if (!events[f].atomic && events[a].at.before(events[f].at) && events[f].at.before(to))
          return true;
    }
    return false;
  }

  std::vector<Block> blocks_;
};

inline Handovers handovers;

#if defined(__SANITIZE_THREAD__)
inline constexpr size_t kGranule = 1;  // plain accesses of any size, see trace.h
#else
inline constexpr size_t kGranule = 4;
#endif

// What is known of a piece of memory. The last write and the last reads say all: what is not in
// order with an earlier access is not in order with one of these. Of reads by other warps and by
// other blocks one each is kept.
class Shadow {
 public:
  Shadow(std::string name, bool global, size_t bytes) : name_(std::move(name)), global_(global) {
    resize(bytes);
  }
  void resize(size_t bytes) { cells_.assign((bytes + kGranule - 1) / kGranule, Cell{}); }

  void read(size_t offset, size_t bytes, unsigned thread, const char* what) {
    const Moment now = Moment::now(thread);
    const auto warp = static_cast<uint16_t>(thread / kLanes);
    for (size_t at = offset / kGranule; at < (offset + bytes + kGranule - 1) / kGranule; ++at) {
      Cell& cell = cells_[at];
      check_copy(cell, at, now, what);
      check_writer(cell, at, now, what);
      if (cell.read_at != now.barriers) {
        if (cell.read_at && !handovers.in_block(cell.read_at)) {
          cell.elsewhere = cell.read_at;
          cell.elsewhere_thread = cell.reader();
        }
        cell.read_at = now.barriers;
        cell.warp = warp;
        cell.lanes = 0;
        cell.stranger = kNobody;
      }
      if (cell.warp != warp) {
        cell.stranger = static_cast<uint16_t>(thread);
        continue;
      }
      if (cell.read_at_warp != now.warp_barriers) cell.lanes = 0;
      cell.read_at_warp = now.warp_barriers;
      cell.lanes |= 1u << thread % kLanes;
    }
  }

  void write(size_t offset, size_t bytes, unsigned thread, const char* what) {
    const Moment now = Moment::now(thread);
    for (size_t at = offset / kGranule; at < (offset + bytes + kGranule - 1) / kGranule; ++at) {
      Cell& cell = cells_[at];
      check_copy(cell, at, now, what);
      check_writer(cell, at, now, what);
      check_readers(cell, at, now, what);
      cell.writer = static_cast<uint16_t>(thread);
      cell.written_at = now.barriers;
      cell.written_at_warp = now.warp_barriers;
    }
  }

  // Between these nobody may touch the bytes.
  void begin_copy(size_t offset, size_t bytes, unsigned thread) {
    write(offset, bytes, thread, "cp.async's issue");
    for (size_t at = offset / kGranule; at < (offset + bytes) / kGranule; ++at)
      cells_[at].copier = static_cast<uint16_t>(thread);
  }
  void end_copy(size_t offset, size_t bytes, unsigned thread) {
    for (size_t at = offset / kGranule; at < (offset + bytes) / kGranule; ++at)
      cells_[at].copier = kNobody;
    write(offset, bytes, thread, "cp.async's copy");
  }

 private:
  static constexpr uint16_t kNobody = 0xffff;
  // Times are barriers passed, the block's or the warp's; 0 is never.
  struct Cell {
    uint32_t written_at = 0, written_at_warp = 0;
    uint32_t read_at = 0, read_at_warp = 0;
    uint32_t elsewhere = 0;  // when another block of the launch read
    uint32_t lanes = 0;      // of `warp` that read at read_at, read_at_warp
    uint16_t writer = kNobody, warp = kNobody;
    uint16_t stranger = kNobody;  // one thread of another warp that read at read_at
    uint16_t copier = kNobody;    // the thread whose copy is under way
    uint16_t elsewhere_thread = kNobody;

    uint16_t reader() const {
      return static_cast<uint16_t>(warp * kLanes + static_cast<unsigned>(std::countr_zero(lanes)));
    }
  };

  void check_copy(const Cell& cell, size_t at, const Moment& now, const char* what) const {
    if (cell.copier != kNobody)
      fail("race", "%s by thread %u at %s +%zu, where a cp.async of thread %u is under way", what,
           now.thread, name_.c_str(), at * kGranule, unsigned{cell.copier});
  }
  void check_writer(const Cell& cell, size_t at, const Moment& now, const char* what) const {
    if (cell.written_at == 0) return;
    check({cell.writer, cell.written_at, cell.written_at_warp}, at, now, what, "wrote");
  }
  void check_readers(const Cell& cell, size_t at, const Moment& now, const char* what) const {
    if (cell.elsewhere) check({cell.elsewhere_thread, cell.elsewhere, 0}, at, now, what, "read");
    if (cell.read_at == 0) return;
    uint32_t lanes = cell.lanes;
    if (cell.warp == now.thread / kLanes && handovers.in_block(cell.read_at))
      lanes &= ~(1u << now.thread % kLanes);
    if (lanes) {
      const unsigned lane = static_cast<unsigned>(std::countr_zero(lanes));
      check({cell.warp * kLanes + lane, cell.read_at, cell.read_at_warp}, at, now, what, "read");
    }
    if (cell.stranger != kNobody) check({cell.stranger, cell.read_at, ~0u}, at, now, what, "read");
  }

  void check(const Moment& earlier, size_t at, const Moment& now, const char* what,
             const char* did) const {
    const bool here = handovers.in_block(earlier.barriers);
    if (here
            ? earlier.before(now)
            : !global_ || !handovers.in_launch(earlier.barriers) || handovers.between(earlier, now))
      return;
    fail("race", "%s by thread %u at %s +%zu, which thread %u %s%s, and no %s between them", what,
         now.thread, name_.c_str(), at * kGranule, earlier.thread, here ? "" : "of another block ",
         did, here ? "barrier" : "handover");
  }

  std::string name_;
  bool global_;
  std::vector<Cell> cells_;
};

}  // namespace cuda_on_host
