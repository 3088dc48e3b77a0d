// Recorded sequences (sequence.h) by number, and the ops that make, run and free them.
#include "sequence.h"

#include <pthread.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "../math/fingerprint.h"

namespace resnet_fast::cpu {
namespace {

// A recorded list of steps, with what it was derived from.
struct Recording {
  std::vector<Tensor> constants;
  std::vector<int64_t> steps;
  std::vector<Tensor> watched;  // alive as long as their memory is looked at
  std::vector<uint64_t> fingerprints;
};

uint64_t bytes_from(const Tensor& t) {
  const auto element = static_cast<int64_t>(t.element_size());
  if (t.is_contiguous()) return static_cast<uint64_t>(t.numel() * element);
  int64_t size = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &size));
  return static_cast<uint64_t>(size - t.storage_offset() * element);
}

// Recordings by number. A number is never used twice.
class Recordings {
 public:
  static Recordings& instance() {
    static Recordings* all = new Recordings();  // never destroyed, like the memory pool
    return *all;
  }

  int64_t add(Recording recording) {
    const std::lock_guard<std::mutex> guard(mutex_);
    known_.emplace(++last_, std::make_shared<const Recording>(std::move(recording)));
    return last_;
  }

  std::shared_ptr<const Recording> find(int64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = known_.find(number);
    STD_TORCH_CHECK(found != known_.end(), "sequence: expected what _make_sequence returned");
    return found->second;
  }

  void remove(int64_t number) {
    std::shared_ptr<const Recording> last;  // its tensors die outside the lock
    const std::lock_guard<std::mutex> guard(mutex_);
    const auto found = known_.find(number);
    if (found == known_.end()) return;
    last = std::move(found->second);
    known_.erase(found);
  }

 private:
  Recordings() {
    // A child of fork() must not find the lock held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Recording>> known_;
  int64_t last_ = 0;
};

int64_t make_sequence(const std::vector<Tensor>& constants, IntList steps,
                      const std::vector<Tensor>& watched) {
  Recording recording{constants, {steps.begin(), steps.end()}, watched, {}};
  for (const Tensor& t : watched) {
    STD_TORCH_CHECK(t.is_cpu(), "watched: expected CPU tensors");
    recording.fingerprints.push_back(fingerprint(data_of<unsigned char>(t), bytes_from(t)));
  }
  return Recordings::instance().add(std::move(recording));
}

void free_sequence(int64_t number) { Recordings::instance().remove(number); }

// Whether the watched tensors are as they were. The team's threads share the misses of the caches.
bool is_unchanged(const Recording& r) {
  const auto count = static_cast<int64_t>(r.watched.size());
  std::atomic<bool> changed{false};
  const auto look = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end) {
        prefetch_fingerprint(data_of<unsigned char>(r.watched[i + 1]),
                             bytes_from(r.watched[i + 1]));
      }
      const Tensor& t = r.watched[i];
      if (fingerprint(data_of<unsigned char>(t), bytes_from(t)) != r.fingerprints[i]) {
        changed.store(true, std::memory_order_relaxed);
      }
    }
  };
  run_on_isa([&](auto isa) { parallel_on<decltype(isa)::value>(count, look); });
  return !changed.load();
}

IntList list_of(const std::vector<int64_t>& values) { return {values.data(), values.size()}; }

// Calls f with the sequence for x, by x's dtype.
template <typename F>
auto with_sequence(const Tensor& x, int64_t number, const F& f) {
  const auto recording = Recordings::instance().find(number);
  const IntList steps = list_of(recording->steps);
  if (x.scalar_type() == ScalarType::BFloat16) {
    return f(*recording, Sequence<bf16>(x, recording->constants, steps), TypeTag<bf16>{});
  }
  if (x.scalar_type() == ScalarType::Byte) {
    return f(*recording, Sequence<uint8_t>(x, recording->constants, steps), TypeTag<uint8_t>{});
  }
  return f(*recording, Sequence<float>(x, recording->constants, steps), TypeTag<float>{});
}

// A large batch runs in pieces, all layers of one before the next, so that memory does not grow
// with it. They are as large as this much memory allows, but of no fewer images a thread than let
// it reuse the weights that it reads.
constexpr int64_t kArenaBytes = int64_t(64) << 20;
constexpr int64_t kImages = 4;

int64_t piece_count(int64_t batch, int64_t arena_bytes) {
  const int64_t fit = std::max(batch * kArenaBytes / std::max<int64_t>(arena_bytes, 1),
                               kImages * std::max<int64_t>(thread_count(), 2));
  return batch <= fit ? 1 : (batch + fit - 1) / fit;
}

// A vector of no elements where a watched tensor has changed.
Tensor run_sequence(const Tensor& x, int64_t number) {
  return with_sequence(x, number, [&](const Recording& recording, const auto& whole, auto tag) {
    using T = typename decltype(tag)::type;
    const Tensor y = whole.output();
    if (y.numel() == 0) return y;
    const auto run = [&](const Sequence<T>& sequence, int64_t image) {
      const Tensor arena = empty_arena(sequence.arena_size(), x.scalar_type(), x);
      return sequence.run(mutable_data_of<T>(arena),
                          mutable_data_of<T>(y) + image * (y.numel() / y.size(0)),
                          [&] { return image > 0 || is_unchanged(recording); });
    };
    Tensor in = whole.input();
    const int64_t batch = in.size(0);
    const int64_t pieces = piece_count(batch, whole.arena_size() * int64_t(sizeof(T)));
    bool ran = pieces > 1 || run(whole, 0);
    for (int64_t i = 0; ran && i < pieces && pieces > 1; ++i) {
      const int64_t first = cut_at(batch, pieces, i), count = cut_at(batch, pieces, i + 1) - first;
      ran = run({torch::stable::narrow(in, 0, first, count), recording.constants,
                 list_of(recording.steps)},
                first);
    }
    return ran ? y : empty({0}, x.scalar_type(), x);
  });
}

// What a run keeps beside its input and output, at most.
int64_t sequence_bytes(const Tensor& x, int64_t number) {
  return with_sequence(x, number, [](const Recording& recording, const auto& whole, auto tag) {
    using T = typename decltype(tag)::type;
    Tensor in = whole.input();
    const int64_t batch = in.size(0), bytes = whole.arena_size() * int64_t(sizeof(T));
    const int64_t pieces = piece_count(batch, bytes);
    if (pieces == 1) return bytes;
    const Sequence<T> piece(torch::stable::narrow(in, 0, 0, (batch + pieces - 1) / pieces),
                            recording.constants, list_of(recording.steps));
    return piece.arena_size() * int64_t(sizeof(T));
  });
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_make_sequence", TORCH_BOX(&resnet_fast::cpu::make_sequence));
  m.impl("_free_sequence", TORCH_BOX(&resnet_fast::cpu::free_sequence));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_run_sequence", TORCH_BOX(&resnet_fast::cpu::run_sequence));
  m.impl("_sequence_bytes", TORCH_BOX(&resnet_fast::cpu::sequence_bytes));
}
