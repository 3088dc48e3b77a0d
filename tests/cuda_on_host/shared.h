// A block's shared memory, the copies into it, and who has touched what since which barrier.
#pragma once

#include <cstring>
#include <vector>

#include "schedule.h"

namespace cuda_on_host {

// What is known of four bytes of shared memory. Two accesses are in order when they are of one
// thread, when the block has passed a barrier between them, or when both are of one warp and it
// has. The last write and the reads since then say all: what is not in order with an earlier access
// is not in order with one of these.
struct Word {
  static constexpr uint16_t kNobody = 0xffff;
  uint32_t written_at = 0, written_at_warp = 0;  // barriers passed: the block's, the warp's
  uint32_t read_at = 0, read_at_warp = 0;
  uint32_t lanes = 0;  // of `warp` that read at read_at, read_at_warp
  uint16_t writer = kNobody, warp = kNobody;
  uint16_t stranger = kNobody;  // one thread of another warp that read at read_at
  uint16_t copier = kNobody;    // the thread whose copy is under way
};

class SharedMemory {
 public:
  // Neither the pointer nor the 32-bit address is aligned to more than 128 bytes.
  static constexpr uint32_t kAlignment = 128;
  static constexpr uint32_t kWindow = 9 * kAlignment;

  void resize(size_t bytes) {
    unpoison();
    storage_.assign(bytes + 4 * kAlignment + 2 * kRedzone, 0);
    const auto start = reinterpret_cast<uintptr_t>(storage_.data()) + kRedzone;
    const auto aligned = (start + 2 * kAlignment - 1) / (2 * kAlignment) * (2 * kAlignment);
    data_ = storage_.data() + kRedzone + (aligned - start) + kAlignment;
    bytes_ = bytes;
    words_.assign((bytes + 3) / 4, Word{});
#if defined(CUDA_ON_HOST_ASAN)
    __asan_poison_memory_region(storage_.data(), static_cast<size_t>(data_ - storage_.data()));
    __asan_poison_memory_region(data_ + bytes, static_cast<size_t>(end() - (data_ + bytes)));
#endif
  }
  ~SharedMemory() { unpoison(); }

  void fill() { std::memset(data_, 0xff, bytes_); }

  unsigned char* data() { return data_; }
  bool contains(const void* pointer) const {
    const auto* p = static_cast<const unsigned char*>(pointer);
    return p >= data_ && p < data_ + bytes_;
  }

  uint32_t address(const void* pointer) const {
    const auto* p = static_cast<const unsigned char*>(pointer);
    if (p < data_ || p > data_ + bytes_)
      fail("out of range", "shared_address of a pointer that is not to shared memory");
    return kWindow + static_cast<uint32_t>(p - data_);
  }

  // The offset of `bytes` bytes at an aligned address.
  uint32_t offset(uint32_t address, unsigned bytes, const char* what) const {
    const int64_t at = int64_t{address} - kWindow;
    if (at < 0 || static_cast<uint64_t>(at) + bytes > bytes_)
      fail("out of range", "%s of %u bytes at shared %+lld, of %zu bytes", what, bytes,
           static_cast<long long>(at), bytes_);
    if (address % bytes != 0)
      fail("misaligned", "%s of %u bytes at shared %+lld", what, bytes, static_cast<long long>(at));
    return static_cast<uint32_t>(at);
  }

  void read(uint32_t offset, unsigned bytes, unsigned thread, const char* what) {
    const uint32_t block_epoch = schedule.barriers;
    const uint16_t warp = static_cast<uint16_t>(thread / kLanes);
    const uint32_t warp_epoch = schedule.warps[warp].barriers;
    for (uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
      Word& word = words_[w];
      check_copy(word, w, thread, what);
      check_writer(word, w, thread, what);
      if (word.read_at != block_epoch) {
        word.read_at = block_epoch;
        word.warp = warp;
        word.lanes = 0;
        word.stranger = Word::kNobody;
      }
      if (word.warp != warp) {
        word.stranger = static_cast<uint16_t>(thread);
        continue;
      }
      if (word.read_at_warp != warp_epoch) word.lanes = 0;
      word.read_at_warp = warp_epoch;
      word.lanes |= 1u << thread % kLanes;
    }
  }

  void write(uint32_t offset, unsigned bytes, unsigned thread, const char* what) {
    const unsigned warp = thread / kLanes;
    const uint32_t warp_epoch = schedule.warps[warp].barriers;
    for (uint32_t w = offset / 4; w < (offset + bytes + 3) / 4; ++w) {
      Word& word = words_[w];
      check_copy(word, w, thread, what);
      check_writer(word, w, thread, what);
      if (word.read_at == schedule.barriers) {
        const uint32_t others = word.lanes & ~(1u << thread % kLanes);
        if (word.warp != warp)
          race(w, thread, what, word.warp * kLanes + first_lane(word.lanes), "read");
        else if (word.stranger != Word::kNobody)
          race(w, thread, what, word.stranger, "read");
        else if (word.read_at_warp == warp_epoch && others)
          race(w, thread, what, warp * kLanes + first_lane(others), "read");
      }
      word.read_at = 0;
      word.writer = static_cast<uint16_t>(thread);
      word.written_at = schedule.barriers;
      word.written_at_warp = warp_epoch;
    }
  }

  // The destination is poison from the issue on, and nobody's until the copy has landed.
  void begin_copy(const Copy& copy, unsigned thread) {
    write(copy.to, copy.bytes, thread, "cp.async's issue");
    std::memset(data_ + copy.to, 0xff, copy.bytes);
    for (uint32_t w = copy.to / 4; w < (copy.to + copy.bytes) / 4; ++w)
      words_[w].copier = static_cast<uint16_t>(thread);
  }
  void land(const Copy& copy, unsigned thread) {
    for (uint32_t w = copy.to / 4; w < (copy.to + copy.bytes) / 4; ++w)
      words_[w].copier = Word::kNobody;
    write(copy.to, copy.bytes, thread, "cp.async's copy");
    if (copy.from)
      std::memcpy(data_ + copy.to, copy.from, copy.bytes);
    else
      std::memset(data_ + copy.to, 0, copy.bytes);
  }

 private:
  static constexpr size_t kRedzone = 4096;

  unsigned char* end() { return storage_.data() + storage_.size(); }
  void unpoison() {
#if defined(CUDA_ON_HOST_ASAN)
    __asan_unpoison_memory_region(storage_.data(), storage_.size());
#endif
  }
  static unsigned first_lane(uint32_t lanes) {
    return static_cast<unsigned>(std::countr_zero(lanes));
  }

  static void check_copy(const Word& word, uint32_t w, unsigned thread, const char* what) {
    if (word.copier != Word::kNobody)
      fail("race", "%s by thread %u at shared +%u, where a cp.async of thread %u is under way",
           what, thread, w * 4, unsigned{word.copier});
  }
  static void check_writer(const Word& word, uint32_t w, unsigned thread, const char* what) {
    if (word.writer == Word::kNobody || word.writer == thread) return;
    if (word.written_at != schedule.barriers) return;
    const unsigned warp = thread / kLanes;
    if (word.writer / kLanes == warp && word.written_at_warp != schedule.warps[warp].barriers)
      return;
    race(w, thread, what, word.writer, "wrote");
  }
  [[noreturn]] static void race(uint32_t w, unsigned thread, const char* what, unsigned other,
                                const char* did) {
    fail("race", "%s by thread %u at shared +%u, which thread %u %s, and no barrier between them",
         what, thread, w * 4, other, did);
  }

  std::vector<unsigned char> storage_;
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
  std::vector<Word> words_;
};

inline SharedMemory shared;

inline unsigned char* shared_memory() { return shared.data(); }
inline uint32_t shared_address(const void* pointer) { return shared.address(pointer); }

inline void copy_async(uint32_t to, const void* from, unsigned bytes, bool valid) {
  const uint32_t offset = shared.offset(to, bytes, "cp.async to");
  if (valid) {
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0)
      fail("misaligned", "cp.async of %u bytes from global %p", bytes, from);
    if (shared.contains(from)) fail("out of range", "cp.async from shared memory");
#if defined(CUDA_ON_HOST_ASAN)
    if (__asan_region_is_poisoned(const_cast<void*>(from), bytes))
      fail("out of range", "cp.async of %u bytes from global %p, outside every tensor", bytes,
           from);
#endif
  }
  Thread& thread = schedule.thread();
  const Copy copy{offset, valid ? from : nullptr, bytes, thread.committed};
  shared.begin_copy(copy, schedule.present);
  thread.copies.push_back(copy);
}

inline void commit_copies() { ++schedule.thread().committed; }

inline void wait_copies(unsigned pending) {
  Thread& thread = schedule.thread();
  auto copy = thread.copies.begin();
  for (; copy != thread.copies.end() && copy->group + pending < thread.committed; ++copy)
    shared.land(*copy, schedule.present);
  thread.copies.erase(thread.copies.begin(), copy);
}

}  // namespace cuda_on_host
