// Stacks to switch between: one for each thread of a block, and the host's own.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#include "language.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_ON_HOST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_ASAN 1
#endif
#if defined(CUDA_ON_HOST_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

#if defined(__x86_64__)
// Saves the registers that a callee must keep on the present stack, whose pointer goes to *from,
// and continues on the stack `to`. swapcontext would enter the system for the signal mask each
// time, and a block of 256 threads switches half a million times for a thousand instructions.
[[gnu::naked, gnu::noinline]] inline void switch_stacks(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

class Fiber {
 public:
  // `body` never returns: it calls leave() when it has nothing to do.
  explicit Fiber(void (*body)()) : body_(body) {
    void* mapped = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED || mprotect(mapped, kGuard, PROT_NONE) != 0)
      fail("host", "no memory for the stack of a thread");
    stack_ = static_cast<char*>(mapped) + kGuard;
#if defined(__x86_64__)
    // As switch_stacks leaves it: six registers, then where it returns to; above that a return
    // address of zero, on which a called function finds the stack 8 bytes off 16.
    auto** top = reinterpret_cast<void**>(stack_ + kStack);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(&Fiber::start);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    here_ = top - 8;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack_;
    here_.uc_stack.ss_size = kStack;
    here_.uc_link = nullptr;
    makecontext(&here_, &Fiber::start, 0);
#endif
  }
  ~Fiber() { munmap(stack_ - kGuard, kGuard + kStack); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // From the host's stack: runs the fiber until it leaves.
  void enter() {
    running() = this;
#if defined(CUDA_ON_HOST_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStack);
#endif
#if defined(__x86_64__)
    switch_stacks(&host_, here_);
#else
    swapcontext(&host_, &here_);
#endif
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // From the running fiber: back to where it was entered.
  static void leave() {
    Fiber& self = *running();
#if defined(CUDA_ON_HOST_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, self.host_stack_, self.host_size_);
#endif
#if defined(__x86_64__)
    switch_stacks(&self.here_, self.host_);
#else
    swapcontext(&self.here_, &self.host_);
#endif
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_finish_switch_fiber(fake, &self.host_stack_, &self.host_size_);
#endif
  }

 private:
  static constexpr size_t kStack = size_t{256} << 10;
  static constexpr size_t kGuard = size_t{4} << 10;

  static Fiber*& running() {
    static Fiber* fiber = nullptr;
    return fiber;
  }
  static void start() {
    Fiber& self = *running();
#if defined(CUDA_ON_HOST_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self.host_stack_, &self.host_size_);
#endif
    self.body_();
    std::abort();
  }

  void (*body_)();
  char* stack_;
#if defined(__x86_64__)
  void *here_, *host_ = nullptr;
#else
  ucontext_t here_, host_;
#endif
#if defined(CUDA_ON_HOST_ASAN)
  const void* host_stack_ = nullptr;
  size_t host_size_ = 0;
#endif
};

}  // namespace cuda_on_host
