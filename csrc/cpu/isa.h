// One source, several instruction sets: run_on_isa(f) calls f(IsaTag<...>{}) inside a function that
// is compiled for the best set this CPU has. f and what it calls must be always-inline (RF_INLINE
// after a lambda's parameters), or the compiler emits it for the baseline.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace resnet_fast::cpu {

#define RF_INLINE __attribute__((always_inline))

enum class Isa { baseline, avx2, avx512 };

template <Isa I>
struct IsaTag {
  static constexpr Isa value = I;
};

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define RF_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define RF_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))

inline Isa detect_isa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  if (!avx2) return Isa::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : Isa::avx2;
}

template <typename F>
RF_TARGET_AVX512 void run_avx512(const F& f) {
  f(IsaTag<Isa::avx512>{});
}
template <typename F>
RF_TARGET_AVX2 void run_avx2(const F& f) {
  f(IsaTag<Isa::avx2>{});
}
#else
inline Isa detect_isa() { return Isa::baseline; }
template <typename F>
void run_avx512(const F& f) {
  f(IsaTag<Isa::baseline>{});
}
template <typename F>
void run_avx2(const F& f) {
  f(IsaTag<Isa::baseline>{});
}
#endif

// RESNET_FAST_MAX_ISA = baseline, avx2 or avx512 lowers the set, so that each can be tested on one
// machine; anything else is ignored.
inline Isa current_isa() {
  static const Isa isa = [] {
    const Isa found = detect_isa();
    const char* limit = std::getenv("RESNET_FAST_MAX_ISA");
    if (limit == nullptr) return found;
    const std::string_view name = limit;
    const Isa most = name == "baseline" ? Isa::baseline : name == "avx2" ? Isa::avx2 : Isa::avx512;
    return std::min(found, most);
  }();
  return isa;
}

// Whether the set is avx512 as RESNET_FAST_MAX_ISA names it, without what came to it later.
inline bool is_plain_avx512() {
  static const bool plain = [] {
    const char* limit = std::getenv("RESNET_FAST_MAX_ISA");
    return limit != nullptr && std::string_view(limit) == "avx512";
  }();
  return plain;
}

template <typename F>
void run_on_isa(const F& f) {
  switch (current_isa()) {
    case Isa::avx512:
      return run_avx512(f);
    case Isa::avx2:
      return run_avx2(f);
    default:
      return f(IsaTag<Isa::baseline>{});
  }
}

// Calls f compiled for I, which this CPU must have.
template <Isa I, typename F>
void run_on(const F& f) {
  if constexpr (I == Isa::avx512) {
    run_avx512(f);
  } else if constexpr (I == Isa::avx2) {
    run_avx2(f);
  } else {
    f(IsaTag<Isa::baseline>{});
  }
}

// For loops bound by memory: 256-bit vectors reach the bandwidth, and one variant less is compiled.
template <typename F>
void run_on_avx2(const F& f) {
  if (current_isa() == Isa::baseline) return f(IsaTag<Isa::baseline>{});
  run_avx2(f);
}

}  // namespace resnet_fast::cpu
