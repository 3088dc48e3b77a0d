// Whether tensors are as they were, looked at while something else runs.
#pragma once

#include <atomic>
#include <utility>
#include <vector>

#include "../math/fingerprint.h"
#include "../stable.h"
#include "team.h"

namespace resnet_fast::cpu {

// Tensors and what their memory held. Their samples are misses of all caches and of most pages'
// translations, 0.1 ms for the weights of a network that takes 4: a thread asks for those of one
// tensor after a task of its own, and looks at them after the next.
class Watch final : public Errand {
 public:
  struct Held {
    Tensor tensor;
    uint64_t bytes, fingerprint;
  };

  // `held` outlives it.
  explicit Watch(const std::vector<Held>& held)
      : held_(held), asked_(static_cast<size_t>(thread_count()), kNone) {}

  void go_on(int64_t rank) override {
    int64_t& asked = asked_[rank];
    look(asked);
    asked = next_.fetch_add(1, std::memory_order_relaxed);
    if (asked >= count()) {
      asked = kNone;
      next_.store(count(), std::memory_order_relaxed);
      return;
    }
    const Held& h = held_[asked];
    prefetch_fingerprint(data_of<unsigned char>(h.tensor), h.bytes);
  }

  // Looks at the rest, when nobody goes on any more.
  bool holds() {
    for (int64_t& asked : asked_) look(std::exchange(asked, kNone));
    for (int64_t i = next_.exchange(count()); i < count(); ++i) look(i);
    return !changed_.load(std::memory_order_relaxed);
  }

 private:
  static constexpr int64_t kNone = -1;

  int64_t count() const { return static_cast<int64_t>(held_.size()); }

  void look(int64_t i) {
    if (i == kNone) return;
    const Held& h = held_[i];
    if (fingerprint(data_of<unsigned char>(h.tensor), h.bytes) != h.fingerprint) {
      changed_.store(true, std::memory_order_relaxed);
    }
  }

  const std::vector<Held>& held_;
  std::vector<int64_t> asked_;  // by each thread, and not looked at yet
  std::atomic<int64_t> next_{0};
  std::atomic<bool> changed_{false};
};

}  // namespace resnet_fast::cpu
