// Recorded sequences (sequence.h) by number, and the ops that make, run and free them.
#include "sequence.h"

#include <pthread.h>

#include <map>
#include <memory>
#include <mutex>

#include "watch.h"

namespace resnet_fast::cpu {
namespace {

// What a sequence is made for: the dtype, shape [N, C, H, W] and threads.
using SequenceKey = std::array<int64_t, 6>;

// A recorded list of steps, with what it was derived from.
struct Recording {
  std::vector<Tensor> constants;
  std::vector<int64_t> steps;
  std::vector<Watch::Held> watched;  // alive as long as their memory is looked at
  // The sequences that were made of it, behind the lock of all recordings.
  mutable std::map<SequenceKey, std::shared_ptr<const void>> made;
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

  // The sequence for inputs of that size: a list of steps takes longer to read than to look up.
  template <typename T>
  std::shared_ptr<const Sequence<T>> sequence(const Recording& recording,
                                              const std::array<int64_t, 4>& size) {
    constexpr size_t kKept = 8;
    const SequenceKey key = {static_cast<int64_t>(Sequence<T>::kType),
                             size[0],
                             size[1],
                             size[2],
                             size[3],
                             thread_count()};
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      const auto found = recording.made.find(key);
      if (found != recording.made.end()) {
        return std::static_pointer_cast<const Sequence<T>>(found->second);
      }
    }
    const IntList steps{recording.steps.data(), recording.steps.size()};
    auto made = std::make_shared<const Sequence<T>>(size, recording.constants, steps);
    const std::lock_guard<std::mutex> guard(mutex_);
    if (recording.made.size() == kKept) recording.made.erase(recording.made.begin());
    recording.made[key] = made;
    return made;
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
  Recording recording{constants, {steps.begin(), steps.end()}, {}, {}};
  for (const Tensor& t : watched) {
    STD_TORCH_CHECK(t.is_cpu(), "watched: expected CPU tensors");
    const uint64_t bytes = bytes_from(t);
    recording.watched.push_back({t, bytes, fingerprint(data_of<unsigned char>(t), bytes)});
  }
  return Recordings::instance().add(std::move(recording));
}

void free_sequence(int64_t number) { Recordings::instance().remove(number); }

// Calls f with the recording and the sequence of it for x, by x's dtype.
template <typename F>
auto with_sequence(const Tensor& x, int64_t number, const F& f) {
  const auto recording = Recordings::instance().find(number);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0, "x: expected shape [N, C, H, W]");
  const std::array<int64_t, 4> size = {x.size(0), x.size(1), x.size(2), x.size(3)};
  const auto call = [&](auto tag) {
    using T = typename decltype(tag)::type;
    return f(*recording, *Recordings::instance().sequence<T>(*recording, size), tag);
  };
  if (x.scalar_type() == ScalarType::BFloat16) return call(TypeTag<bf16>{});
  if (x.scalar_type() == ScalarType::Byte) return call(TypeTag<uint8_t>{});
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32, bfloat16 or uint8");
  return call(TypeTag<float>{});
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

// The sequence for `count` images like those of x.
template <typename T>
auto piece_of(const Recording& recording, const Tensor& x, int64_t count) {
  return Recordings::instance().sequence<T>(recording, {count, x.size(1), x.size(2), x.size(3)});
}

// A vector of no elements where a watched tensor has changed.
Tensor run_sequence(const Tensor& x, int64_t number) {
  return with_sequence(x, number, [&](const Recording& recording, const auto& whole, auto tag) {
    using T = typename decltype(tag)::type;
    const auto [batch, channels, height, width] = whole.output();
    const Tensor y = empty_channels_last({batch, channels, height, width}, x);
    if (y.numel() == 0) return y;
    const bool planar = whole.takes_planar() && x.is_contiguous() && !is_channels_last(x);
    const Tensor in = planar ? x : as_format(x, MemoryFormat::ChannelsLast);
    const int64_t bytes = whole.arena_size() * int64_t(sizeof(T));
    const int64_t pieces = piece_count(batch, bytes);
    Watch watch(recording.watched);
    const auto run = [&](const Sequence<T>& sequence, int64_t image) {
      const Tensor arena = empty_arena(sequence.arena_size(), x.scalar_type(), x);
      sequence.run(data_of<T>(in) + image * (in.numel() / batch), planar, mutable_data_of<T>(arena),
                   mutable_data_of<T>(y) + image * (y.numel() / batch), &watch);
    };
    if (pieces == 1) {
      run(whole, 0);
    } else {
      for (int64_t i = 0; i < pieces && watch.holds(); ++i) {
        const int64_t first = cut_at(batch, pieces, i);
        run(*piece_of<T>(recording, x, cut_at(batch, pieces, i + 1) - first), first);
      }
    }
    // What was computed with weights that are no longer the module's is nobody's.
    return watch.holds() ? y : empty({0}, x.scalar_type(), x);
  });
}

// What a run keeps beside its input and output, at most.
int64_t sequence_bytes(const Tensor& x, int64_t number) {
  return with_sequence(x, number, [&](const Recording& recording, const auto& whole, auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t batch = x.size(0), bytes = whole.arena_size() * int64_t(sizeof(T));
    const int64_t pieces = piece_count(batch, bytes);
    if (pieces == 1) return bytes;
    return piece_of<T>(recording, x, (batch + pieces - 1) / pieces)->arena_size() *
           int64_t(sizeof(T));
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
