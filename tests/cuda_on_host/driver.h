// One case for a kernel, from stdin; its outputs to stdout.
//
// In:   lines `int NAME VALUE`, `number NAME VALUE`, `word NAME VALUE`, `tensor NAME BYTES`, then
//       `end`, then the bytes of the tensors in their order.
// Out:  lines `tensor NAME BYTES`, then `end`, then the bytes.
//
// The word `order` and the int `seed` choose the schedule.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda.h"

namespace cuda_on_host {

class Case {
 public:
  Case() {
    std::vector<std::pair<std::string, size_t>> tensors;
    for (std::string kind, name; read_line(kind, name);) {
      std::string value;
      if (!(std::cin >> value)) fail("case", "no value for %s", name.c_str());
      if (kind == "tensor")
        tensors.emplace_back(name, std::strtoull(value.c_str(), nullptr, 10));
      else
        values_[kind + ' ' + name] = value;
    }
    for (const auto& [name, bytes] : tensors) {
      // malloc and not aligned_alloc, which may round the size up and hide an overrun.
      Buffer data(static_cast<unsigned char*>(std::malloc(bytes)));
      if (!std::cin.read(reinterpret_cast<char*>(data.get()), static_cast<std::streamsize>(bytes)))
        fail("case", "tensor %s is cut short", name.c_str());
      inputs_[name] = {std::move(data), bytes};
    }
    const std::string order = word("order");
    if (order != "ascending" && order != "descending" && order != "shuffled")
      fail("case", "order %s", order.c_str());
    schedule.order = order == "ascending"    ? Order::ascending
                     : order == "descending" ? Order::descending
                                             : Order::shuffled;
    schedule.random.seed(static_cast<uint64_t>(integer("seed")));
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  int64_t integer(const char* name) const {
    return std::strtoll(value("int", name).c_str(), nullptr, 10);
  }
  double number(const char* name) const {
    return std::strtod(value("number", name).c_str(), nullptr);
  }
  std::string word(const char* name) const { return value("word", name); }

  // A buffer of exactly the tensor's size; nullptr when the case has none of that name.
  template <typename T>
  const T* input(const char* name) const {
    return static_cast<const T*>(find(name, sizeof(T)));
  }
  // NaN in every format, between guards.
  template <typename T>
  T* output(const char* name, int64_t count) {
    return reinterpret_cast<T*>(guarded(name, static_cast<size_t>(count) * sizeof(T), true));
  }
  template <typename T>
  T* scratch(const char* name, int64_t count) {
    return reinterpret_cast<T*>(guarded(name, static_cast<size_t>(count) * sizeof(T), false));
  }

  // Checks the guards and writes the outputs: main's result.
  int finish() {
    for (const auto& it : guarded_) {
#if defined(CUDA_ON_HOST_ASAN)
      __asan_unpoison_memory_region(it.data.get(), it.bytes + 2 * kGuard);
#endif
      for (size_t i = 0; i < kGuard; ++i)
        if (it.data[i] != 0xff || it.data[kGuard + it.bytes + i] != 0xff)
          fail("out of range", "a write outside %s, of %zu bytes", it.name.c_str(), it.bytes);
      if (it.written_out) std::printf("tensor %s %zu\n", it.name.c_str(), it.bytes);
    }
    std::printf("end\n");
    for (const auto& it : guarded_)
      if (it.written_out) std::fwrite(it.data.get() + kGuard, 1, it.bytes, stdout);
    if (std::fflush(stdout) != 0) fail("case", "cannot write the outputs");
    return 0;
  }

 private:
  static constexpr size_t kGuard = 64;
  struct Free {
    void operator()(unsigned char* data) const { std::free(data); }
  };
  using Buffer = std::unique_ptr<unsigned char[], Free>;
  struct Input {
    Buffer data;
    size_t bytes;
  };
  struct Guarded {
    std::string name;
    Buffer data;
    size_t bytes;
    bool written_out;
    std::unique_ptr<Shadow> shadow;
  };

  // False at `end`, behind whose line the tensors' bytes begin.
  static bool read_line(std::string& kind, std::string& name) {
    if (!(std::cin >> kind)) fail("case", "no end");
    if (kind != "end") return static_cast<bool>(std::cin >> name);
    std::cin.get();
    return false;
  }

  // Not in the templates, which are compiled once for each kernel.
  [[gnu::noinline]] const void* find(const char* name, size_t element) const {
    const auto found = inputs_.find(name);
    if (found == inputs_.end()) return nullptr;
    if (found->second.bytes % element != 0)
      fail("case", "tensor %s has %zu bytes", name, found->second.bytes);
    return found->second.data.get();
  }

  const std::string& value(const std::string& kind, const char* name) const {
    const auto found = values_.find(kind + ' ' + name);
    if (found == values_.end()) fail("case", "no %s %s", kind.c_str(), name);
    return found->second;
  }

  [[gnu::noinline]] unsigned char* guarded(const char* name, size_t bytes, bool written_out) {
    Buffer data(static_cast<unsigned char*>(std::malloc(bytes + 2 * kGuard)));
    std::memset(data.get(), 0xff, bytes + 2 * kGuard);
#if defined(CUDA_ON_HOST_ASAN)
    __asan_poison_memory_region(data.get(), kGuard);
    __asan_poison_memory_region(data.get() + kGuard + bytes, kGuard);
#endif
    unsigned char* begin = data.get() + kGuard;
    guarded_.push_back({name, std::move(data), bytes, written_out, nullptr});
#if defined(__SANITIZE_THREAD__)
    guarded_.back().shadow = std::make_unique<Shadow>(name, true, bytes);
    watch(begin, bytes, guarded_.back().shadow.get());
#endif
    return begin;
  }

  std::map<std::string, std::string> values_;
  std::map<std::string, Input> inputs_;
  std::vector<Guarded> guarded_;
};

}  // namespace cuda_on_host
