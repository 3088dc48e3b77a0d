// What this machine's cores can do at most: multiply-adds from registers, and reads from memory.
//
//   c++ -std=c++20 -O3 -march=native -o peak benchmarks/peak.cpp -lpthread && ./peak [threads]
//
// Prints one line a measure: its name, the median and the best of several runs, the unit. A share
// of peak is a share of the median.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vec __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / 4;

// Sums in flight: more than latency times units on any core, fewer than there are registers.
constexpr int kSums = kBytes == 64 ? 24 : 12;
constexpr int kRuns = 9;

// The sums stay in registers: the loop over them is unrolled whole, and nothing is known of the
// factors from one step to the next.
__attribute__((noinline)) float multiply_add_fp32(int64_t steps) {
  Vec sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = Vec{} + float(i);
  Vec a = Vec{} + 0.9999f, b = Vec{} + 0.5f;
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("" : "+x"(a), "+x"(b));
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = sums[i] * a + b;
  }
  Vec total = {};
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) total += sums[i];
  return total[0];
}

#if defined(__AVX512BF16__)
__attribute__((noinline)) float multiply_add_bf16(int64_t steps) {
  __m512 sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = reinterpret_cast<__m512>(Vec{} + float(i));
  Vec factors = Vec{} + 0.5f;
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("" : "+x"(factors));
    const __m512bh pairs = reinterpret_cast<__m512bh>(factors);
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], pairs, pairs);
  }
  Vec total = {};
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) total += reinterpret_cast<Vec>(sums[i]);
  return total[0];
}
#endif

#if defined(__AVX512VNNI__)
__attribute__((noinline)) float multiply_add_int8(int64_t steps) {
  __m512i sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_epi32(i);
  __m512i factors = _mm512_set1_epi8(3);
  for (int64_t step = 0; step < steps; ++step) {
    asm volatile("" : "+x"(factors));
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      // Of the intrinsic GCC 12 copies sums through the stack, and gets half the rate.
      asm("vpdpbusd %1, %1, %0" : "+v"(sums[i]) : "v"(factors));
    }
  }
  typedef int Ints __attribute__((vector_size(64)));
  Ints total = {};
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) total += reinterpret_cast<Ints>(sums[i]);
  return float(total[0]);
}
#endif

__attribute__((noinline)) float read_all(const float* from, int64_t count) {
  Vec sums[8] = {};
  for (int64_t i = 0; i + 8 * kLanes <= count; i += 8 * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] += *reinterpret_cast<const Vec*>(from + i + j * kLanes);
  }
  Vec total = {};
  for (const Vec& sum : sums) total += sum;
  return total[0];
}

volatile float sink;

// Runs work(thread) on all threads; prints `amount`, of all threads together, a second.
template <typename Work>
void measure(const char* name, const char* unit, int threads, double amount, const Work& work) {
  std::vector<double> rates;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back([&work, t] { sink = work(t); });
    sink = work(0);
    for (std::thread& other : others) other.join();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    rates.push_back(amount / took.count() / 1e9);
  }
  std::sort(rates.begin(), rates.end());
  std::printf("%-5s %8.1f %8.1f %s\n", name, rates[kRuns / 2], rates.back(), unit);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1]))
                               : std::max(1, int(std::thread::hardware_concurrency()));
  constexpr int64_t kSteps = 10'000'000;
  const double fp32 = 2.0 * kLanes * kSums * kSteps * threads;
  measure("fp32", "GFLOP/s", threads, fp32, [](int) { return multiply_add_fp32(kSteps); });
#if defined(__AVX512BF16__)
  measure("bf16", "GFLOP/s", threads, 2 * fp32, [](int) { return multiply_add_bf16(kSteps); });
#endif
#if defined(__AVX512VNNI__)
  measure("int8", "GOP/s", threads, 4 * fp32, [](int) { return multiply_add_int8(kSteps); });
#endif
  constexpr int64_t kCount = 48 << 20;  // floats a thread: far beyond any cache
  std::vector<std::unique_ptr<float, decltype(&std::free)>> memory;
  for (int t = 0; t < threads; ++t) {
    auto* block = static_cast<float*>(std::aligned_alloc(64, kCount * sizeof(float)));
    if (block == nullptr) return 1;
    std::fill_n(block, kCount, 1.0f);
    memory.emplace_back(block, &std::free);
  }
  measure("read", "GB/s", threads, 4.0 * kCount * threads,
          [&](int t) { return read_all(memory[t].get(), kCount); });
}
