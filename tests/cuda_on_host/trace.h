// Plain reads and writes of the kernels, for the search for races, where the program is compiled
// with -fsanitize=thread and linked without: what the compiler calls before each access is here
// instead of in its library. Include it in one file of a program.
#pragma once

#include <cstddef>
#include <cstdint>

#include "races.h"

namespace cuda_on_host {

struct Watched {
  const unsigned char* begin;
  size_t bytes;
  Shadow* shadow;
};
// Neither a container nor a reference: an access inside of touch() would be reported to touch().
inline constexpr unsigned kMostWatched = 32;
inline Watched watched[kMostWatched];
inline unsigned watched_count = 0;

inline void watch(const void* begin, size_t bytes, Shadow* shadow) {
  for (unsigned i = 0; i < watched_count; ++i)
    if (watched[i].shadow == shadow) watched[i] = watched[--watched_count];
  if (watched_count == kMostWatched) fail("case", "more than %u buffers", kMostWatched);
  watched[watched_count++] = {static_cast<const unsigned char*>(begin), bytes, shadow};
}

[[gnu::no_sanitize("thread")]] inline void touch(const void* pointer, size_t bytes, bool write,
                                                 const char* what) {
  if (!in_kernel) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  for (unsigned i = 0; i < watched_count; ++i) {
    const Watched& it = watched[i];
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(it.begin);
    if (offset >= it.bytes) continue;
    if (write)
      it.shadow->write(offset, bytes, schedule.present, what);
    else
      it.shadow->read(offset, bytes, schedule.present, what);
    return;
  }
}

}  // namespace cuda_on_host

#if defined(__SANITIZE_THREAD__)
#define CUDA_ON_HOST_HOOK(name, ...) \
  extern "C" [[gnu::used, gnu::no_sanitize("thread")]] void __tsan_##name(__VA_ARGS__)
#define CUDA_ON_HOST_ACCESS(bytes)                           \
  CUDA_ON_HOST_HOOK(read##bytes, void* address) {            \
    cuda_on_host::touch(address, bytes, false, "a read");    \
  }                                                          \
  CUDA_ON_HOST_HOOK(write##bytes, void* address) {           \
    cuda_on_host::touch(address, bytes, true, "a write");    \
  }                                                          \
  CUDA_ON_HOST_HOOK(unaligned_read##bytes, void* address) {  \
    cuda_on_host::touch(address, bytes, false, "a read");    \
  }                                                          \
  CUDA_ON_HOST_HOOK(unaligned_write##bytes, void* address) { \
    cuda_on_host::touch(address, bytes, true, "a write");    \
  }
CUDA_ON_HOST_ACCESS(1)
CUDA_ON_HOST_ACCESS(2)
CUDA_ON_HOST_ACCESS(4)
CUDA_ON_HOST_ACCESS(8)
CUDA_ON_HOST_ACCESS(16)
CUDA_ON_HOST_HOOK(read_range, void* address, unsigned long bytes) {
  cuda_on_host::touch(address, bytes, false, "a read");
}
CUDA_ON_HOST_HOOK(write_range, void* address, unsigned long bytes) {
  cuda_on_host::touch(address, bytes, true, "a write");
}
CUDA_ON_HOST_HOOK(func_entry, void*) {}
CUDA_ON_HOST_HOOK(func_exit) {}
CUDA_ON_HOST_HOOK(vptr_update, void**, void*) {}
CUDA_ON_HOST_HOOK(init) {}
#undef CUDA_ON_HOST_ACCESS
#undef CUDA_ON_HOST_HOOK
#endif
