// Stacks to switch between: one for each thread of a block, and the host's own.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>

#include "language.h"

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_HOST_ASAN 1
#endif
#endif
#if defined(CUDA_ON_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the switch of stacks is written for x86-64"
#endif

namespace cuda_on_host {

// Saves what a callee must keep on the present stack, whose pointer goes to *from, and continues on
// the stack `to`. Not swapcontext: that asks the system for the signal mask each time, and
// AddressSanitizer's swapcontext forgets all it knows of the stack.
[[gnu::naked, gnu::noinline]] inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

class Fiber {
 public:
  // The host's own stack.
  Fiber() = default;
  // `body` never returns: it switches away when it has nothing to do.
  explicit Fiber(void (*body)()) : body_(body) {
    void* mapped = mmap(nullptr, kGuard + kSize, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED || mprotect(mapped, kGuard, PROT_NONE) != 0)
      fail("host", "no memory for a thread's stack");
    stack_ = static_cast<char*>(mapped) + kGuard;
    size_ = kSize;
    // As switch_stacks leaves it: six registers and the address to return to. Above it a return
    // address of zero, since a function finds its stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(static_cast<char*>(mapped) + kGuard + kSize) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(&Fiber::start);
    here_ = top;
  }
  ~Fiber() {
    if (body_) munmap(static_cast<char*>(const_cast<void*>(stack_)) - kGuard, kGuard + kSize);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From this fiber, the running one, to another; returns when somebody switches back.
  void switch_to(Fiber& next) {
    if (&next == this) return;
    previous = this;
    running = &next;
#if defined(CUDA_ON_HOST_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, next.stack_, next.size_);
    switch_stacks(&here_, next.here_);
    __sanitizer_finish_switch_fiber(fake, &previous->stack_, &previous->size_);
#else
    switch_stacks(&here_, next.here_);
#endif
  }

 private:
  static constexpr size_t kSize = size_t{256} << 10;
  static constexpr size_t kGuard = size_t{4} << 10;

  static void start() {
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &previous->stack_, &previous->size_);
#endif
    running->body_();
    std::abort();
  }

  static inline Fiber *running = nullptr, *previous = nullptr;
  void (*body_)() = nullptr;
  void* here_ = nullptr;
  const void* stack_ = nullptr;
  size_t size_ = 0;
};

}  // namespace cuda_on_host
