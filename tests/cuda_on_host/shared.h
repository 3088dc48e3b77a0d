// A block's shared memory and the copies into it.
#pragma once

#include <cstring>
#include <vector>

#include "races.h"
#include "schedule.h"
#include "trace.h"

namespace cuda_on_host {

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
    shadow_.resize(bytes);
    watch(data_, bytes, &shadow_);
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

  // Four bytes, read by a thread that need not be the present one.
  [[gnu::no_sanitize("thread")]] uint32_t word(uint32_t offset, unsigned thread) {
    shadow_.read(offset, 4, thread, "ldmatrix's read");
    return *reinterpret_cast<const uint32_t*>(data_ + offset);
  }

  // The destination is poison from the issue on, and nobody's until the copy has landed.
  void begin_copy(const Copy& copy, unsigned thread) {
    shadow_.begin_copy(copy.to, copy.bytes, thread);
    std::memset(data_ + copy.to, 0xff, copy.bytes);
  }
  void land(const Copy& copy, unsigned thread) {
    shadow_.end_copy(copy.to, copy.bytes, thread);
    if (copy.from) {
      touch(copy.from, copy.bytes, false, "cp.async's read");
      std::memcpy(data_ + copy.to, copy.from, copy.bytes);
    } else {
      std::memset(data_ + copy.to, 0, copy.bytes);
    }
  }

 private:
  static constexpr size_t kRedzone = 4096;

  unsigned char* end() { return storage_.data() + storage_.size(); }
  void unpoison() {
#if defined(CUDA_ON_HOST_ASAN)
    __asan_unpoison_memory_region(storage_.data(), storage_.size());
#endif
  }
  std::vector<unsigned char> storage_;
  unsigned char* data_ = nullptr;
  size_t bytes_ = 0;
  Shadow shadow_{"shared", false, 0};
};

inline SharedMemory shared;

inline unsigned char* shared_memory() { return shared.data(); }
inline uint32_t shared_address(const void* pointer) { return shared.address(pointer); }

inline void copy_async(uint32_t to, const void* from, unsigned bytes, bool valid) {
  const uint32_t offset = shared.offset(to, bytes, "a cp.async");
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
