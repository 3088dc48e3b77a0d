#include "pool.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <set>
#include <utility>

namespace resnet_fast::cpu {
namespace {

constexpr size_t kPooledBytes = size_t(64) << 10;  // smaller blocks are malloc's own business
constexpr size_t kUnit = size_t(64) << 10;         // blocks are cut at multiples of it
constexpr size_t kHugePage = size_t(2) << 20;

// How long what a pool holds lives. Weights have a pool of their own: one that were put where an
// output was would keep that output's whole segment.
enum Life { kPassing, kLasting };

// Segments from the system, cut into blocks; best fit, and free neighbours grow together, so that
// layers of any size use the same memory. Segments that are free as a whole go back to the system
// where they, or a new one, would take the pool past what was ever in use at once, and half of that
// where what it holds is passing.
class Pool {
 public:
  // Never destroyed: tensors may outlive static destruction.
  static Pool& of(Life life) {
    static Pool* const pools = [] {
      // A child of fork() must not find a lock held by a thread that it does not have.
      pthread_atfork([] { lock(true); }, [] { lock(false); }, [] { lock(false); });
      return new Pool[2]{Pool(2), Pool(0)};
    }();
    return pools[life];
  }

  void* take(size_t bytes) {
    const size_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    const std::lock_guard<std::mutex> guard(mutex_);
    most_used_ = std::max(most_used_, used_ + size);
    auto fit = free_.lower_bound({size, nullptr});
    if (fit == free_.end()) {
      add_segment((size + kHugePage - 1) / kHugePage * kHugePage);
      fit = free_.lower_bound({size, nullptr});
    }
    std::byte* start = fit->second;
    free_.erase(fit);
    Block& block = blocks_.at(start);
    if (block.size > size) {
      insert_free(start + size, {block.size - size, block.segment, true});
      block.size = size;
    }
    block.free = false;
    used_ += size;
    return start;
  }

  void give(void* start) {
    const std::lock_guard<std::mutex> guard(mutex_);
    auto at = blocks_.find(static_cast<std::byte*>(start));
    used_ -= at->second.size;
    at->second.free = true;
    const auto next = std::next(at);
    if (next != blocks_.end() && joins(at, next)) {
      free_.erase({next->second.size, next->first});
      at->second.size += next->second.size;
      blocks_.erase(next);
    }
    if (at != blocks_.begin() && joins(std::prev(at), at)) {
      const auto before = std::prev(at);
      free_.erase({before->second.size, before->first});
      before->second.size += at->second.size;
      blocks_.erase(at);
      at = before;
    }
    free_.insert({at->second.size, at->first});
    drop_free_segments(bound());  // what was in use when the others were released
  }

  size_t release() {
    const std::lock_guard<std::mutex> guard(mutex_);
    const size_t before = held_;
    drop_free_segments(0);
    most_used_ = used_;
    return before - held_;
  }

 private:
  struct Block {
    size_t size;
    std::byte* segment;
    bool free;
  };
  using Blocks = std::map<std::byte*, Block>;

  // Keeps a part in `spare` more than was ever in use; nothing more if 0.
  explicit Pool(size_t spare) : spare_(spare) {}

  static void lock(bool locks) {
    for (const Life life : {kPassing, kLasting}) {
      std::mutex& mutex = of(life).mutex_;
      locks ? mutex.lock() : mutex.unlock();
    }
  }

  static bool joins(Blocks::iterator a, Blocks::iterator b) {
    return a->second.free && b->second.free && a->second.segment == b->second.segment;
  }

  void insert_free(std::byte* start, Block block) {
    blocks_.insert({start, block});
    free_.insert({block.size, start});
  }

  size_t bound() const { return most_used_ + (spare_ == 0 ? 0 : most_used_ / spare_); }

  void add_segment(size_t size) {
    drop_free_segments(bound() > size ? bound() - size : 0);
    auto* segment = static_cast<std::byte*>(std::aligned_alloc(kHugePage, size));
    if (segment == nullptr) throw std::bad_alloc();
    // One fault a 2 MiB page instead of 512, where the system grants it.
    madvise(segment, size, MADV_HUGEPAGE);
    segments_.insert({segment, size});
    held_ += size;
    insert_free(segment, {size, segment, true});
  }

  // Gives free segments back until the pool holds `bound` bytes at most.
  void drop_free_segments(size_t bound) {
    for (auto at = segments_.begin(); at != segments_.end() && held_ > bound;) {
      const auto block = blocks_.find(at->first);
      if (block->second.free && block->second.size == at->second) {
        free_.erase({at->second, at->first});
        blocks_.erase(block);
        held_ -= at->second;
        std::free(at->first);
        at = segments_.erase(at);
      } else {
        ++at;
      }
    }
  }

  const size_t spare_;
  std::mutex mutex_;
  Blocks blocks_;
  std::set<std::pair<size_t, std::byte*>> free_;
  std::map<std::byte*, size_t> segments_;
  size_t used_ = 0, held_ = 0, most_used_ = 0;
};

template <Life life>
void give_back(void* block) {
  Pool::of(life).give(block);
}

template <Life life>
Tensor empty_pooled(const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                    ScalarType dtype, const Tensor& like, MemoryFormat format) {
  size_t bytes = dtype == ScalarType::Float                               ? 4
                 : dtype == ScalarType::Byte || dtype == ScalarType::Char ? 1
                                                                          : 2;
  for (const int64_t n : shape) bytes *= static_cast<size_t>(n);
#if defined(__SANITIZE_ADDRESS__)
  const bool pooled = false;  // reuse would hide accesses to freed memory
#else
  const bool pooled = bytes >= kPooledBytes;
#endif
  if (!pooled) return empty(shape, dtype, like, format);
  void* block = Pool::of(life).take(bytes);
  try {
    return torch::stable::from_blob(block, IntList(shape.data(), shape.size()),
                                    IntList(strides.data(), strides.size()), like.device(), dtype,
                                    &give_back<life>);
  } catch (...) {
    give_back<life>(block);
    throw;
  }
}

}  // namespace

Tensor empty_channels_last(const std::vector<int64_t>& shape, const Tensor& like) {
  const auto rank = static_cast<int64_t>(shape.size());
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  strides[1] = step;
  step *= shape[1];
  for (int64_t d = rank - 1; d >= 2; --d) {
    strides[d] = step;
    step *= shape[d];
  }
  strides[0] = step;
  return empty_pooled<kPassing>(shape, strides, like.scalar_type(), like,
                                channels_last_format(rank));
}

Tensor empty_packed(int64_t count, ScalarType dtype, const Tensor& device_of) {
  return empty_pooled<kLasting>({count}, {1}, dtype, device_of, MemoryFormat::Contiguous);
}

Tensor empty_arena(int64_t count, ScalarType dtype, const Tensor& device_of) {
  return empty_pooled<kPassing>({count}, {1}, dtype, device_of, MemoryFormat::Contiguous);
}

int64_t release_pools() {
  const size_t bytes = Pool::of(kPassing).release() + Pool::of(kLasting).release();
#if defined(__GLIBC__)
  malloc_trim(0);  // what verification has left below blocks in use
#endif
  return static_cast<int64_t>(bytes);
}

}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CompositeExplicitAutograd, m) {
  m.impl("_release_memory", TORCH_BOX(&resnet_fast::cpu::release_pools));
}
