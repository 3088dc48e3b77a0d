// The layers of a network as one call: what each is was decided, verified and written down as a
// list of steps (resnet_fast/nn/sequence.py); here they run one after the other.
//
// Between the layers there is no Python, no allocation and no fork of threads: one team stays
// together, and all activations live in one block, the arena. A value has a place there from the
// step that writes it to the last one that reads it; a layer that adds a residual whose last use
// this is writes over it, and a gate over what it scales.
#include <pthread.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>

#include "../math/fingerprint.h"
#include "band.h"
#include "int8.h"
#include "pool.h"
#include "team.h"
#include "window_pool.h"
#include "winograd.h"

namespace resnet_fast::cpu {
namespace {

enum class Kind : int64_t {
  direct = 0,
  max_pool = 1,
  winograd2 = 2,
  mean = 3,
  winograd4 = 4,
  pad_channels = 5,  // every stride-th pixel, zeros for the channels that are new
  gate = 6           // the input times the residual, which has one value a channel
};

// One step as the list holds it. Values are numbered; value 0 is the network's input.
struct Record {
  Kind kind;
  int64_t in, residual, out;  // values; residual -1 where there is none
  int64_t constants;          // index of the first of packed, weight, scale, shift
  int64_t act;
  int64_t filters;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;
};
constexpr int64_t kFields = sizeof(Record) / sizeof(int64_t);
static_assert(sizeof(Record) == 16 * sizeof(int64_t));

struct Step {
  Kind kind;
  int64_t in, residual, out;
  Act act;
  Geometry g{};
  const void *packed = nullptr, *weight = nullptr;
  const float *scale = nullptr, *shift = nullptr;
  int64_t weight_step[4] = {};
  Requantize grid = {0, 1, 1, 0};
};

// What a value is, and where in the arena; the input and the result are tensors of their own.
struct Value {
  int64_t channels = 0, height = 0, width = 0;
  int64_t first = -1, last = -1;  // the steps that write it and read it last
  int64_t reads = 0;              // how often it is read
  int64_t at = -1, size = 0;      // elements from the arena's start
  int64_t count(int64_t batch) const { return batch * channels * height * width; }
};

// Of activations of type T: float, bf16, or bytes on the grids that their steps name (int8.h).
template <typename T>
class Sequence {
 public:
  static constexpr bool kIsFloat = std::is_same_v<T, float>;
  static constexpr bool kIsBytes = std::is_same_v<T, uint8_t>;
  static constexpr ScalarType kType = kIsFloat   ? ScalarType::Float
                                      : kIsBytes ? ScalarType::Byte
                                                 : ScalarType::BFloat16;

  Sequence(const Tensor& x, const std::vector<Tensor>& constants, IntList records) : x_(x) {
    STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == kType,
                    "x: expected a CPU tensor of float32, bfloat16 or uint8");
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) > 0, "x: expected shape [N, C, H, W]");
    const auto fields = static_cast<int64_t>(records.size());
    STD_TORCH_CHECK(fields > 0 && fields % kFields == 0, "steps: expected ", kFields,
                    " integers a step");
    const int64_t count = fields / kFields;
    values_.resize(count + 1);
    values_[0] = {x.size(1), x.size(2), x.size(3)};
    steps_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      Record r;
      std::memcpy(&r, records.data() + i * kFields, sizeof(r));
      add(i, r, constants);
    }
    place();
    // A stem reads its bands from either layout; anything else wants channels-last.
    planar_ = x.is_contiguous() && !is_channels_last(x) && values_[0].reads == 1 &&
              steps_[0].kind == Kind::direct && reads_bands(steps_[0].g);
    if (!planar_) x_ = as_format(x, MemoryFormat::ChannelsLast);
  }

  int64_t arena_size() const { return arena_size_; }

  Tensor output() const {
    const Value& last = values_[steps_.back().out];
    return empty_channels_last({x_.size(0), last.channels, last.height, last.width}, x_);
  }

  // `arena` holds arena_size() elements.
  void run(T* arena, T* y) const {
    Team::run([&] {
      for (const Step& s : steps_) {
        const T* in = s.in == 0 ? data_of<T>(x_) : arena + values_[s.in].at;
        const T* residual = s.residual < 0    ? nullptr
                            : s.residual == 0 ? data_of<T>(x_)
                                              : arena + values_[s.residual].at;
        T* out = &s == &steps_.back() ? y : arena + values_[s.out].at;
        run_step(s, in, s.in == 0 && planar_, residual, out);
      }
    });
  }

 private:
  static void run_step(const Step& s, const T* in, bool planar, const T* residual, T* out) {
    if constexpr (kIsBytes) {
      if (s.kind == Kind::max_pool) return max_pool(s.g, in, out);
      return run_int8(s.g, {in, s.packed, s.scale, s.shift, residual, out, s.act, planar, s.grid});
    } else {
      run_float_step(s, in, planar, residual, out);
    }
  }

  static void run_float_step(const Step& s, const T* in, bool planar, const T* residual, T* out) {
    switch (s.kind) {
      case Kind::direct:
        return run_direct<T>(s.g, {in, s.packed, s.scale, s.shift, residual, out, s.act, planar});
      case Kind::winograd2:
      case Kind::winograd4: {
        WinogradOperands<T> o{in,
                              static_cast<const float*>(s.packed),
                              static_cast<const T*>(s.weight),
                              {},
                              s.scale,
                              s.shift,
                              residual,
                              out,
                              s.act};
        std::copy_n(s.weight_step, 4, o.weight_step);
        return winograd(s.g, static_cast<int64_t>(s.kind), o);
      }
      case Kind::max_pool:
        return max_pool(s.g, in, out);
      case Kind::pad_channels:
        return pad_channels(s.g, in, out);
      case Kind::mean:
        return mean_pool(s.g.batch, s.g.in[1] * s.g.in[2], s.g.channels, in, out);
      case Kind::gate:
        return gate_channels(s.g.batch, s.g.in[1] * s.g.in[2], s.g.channels, in, residual, out);
    }
  }

  // The steps of a list come in the order of their results: step i makes value i + 1, from values
  // made before it.
  void add(int64_t i, const Record& r, const std::vector<Tensor>& constants) {
    STD_TORCH_CHECK(r.kind >= Kind::direct && r.kind <= Kind::gate, "steps: unknown kind");
    STD_TORCH_CHECK(r.out == i + 1 && r.in >= 0 && r.in <= i && r.residual >= -1 && r.residual <= i,
                    "steps: a step reads what the steps before it wrote");
    const bool pads = r.kind == Kind::pad_channels;
    const bool gates = r.kind == Kind::gate;
    const bool convolves = r.kind != Kind::max_pool && r.kind != Kind::mean && !pads && !gates;
    STD_TORCH_CHECK(!kIsBytes || r.kind == Kind::direct || r.kind == Kind::max_pool,
                    "steps: bytes are convolved directly, or pooled");
    STD_TORCH_CHECK(r.act >= 0 && r.act < kActCount, "steps: unknown activation");
    STD_TORCH_CHECK(convolves || ((r.residual < 0) != gates && r.act == 0),
                    "steps: only a convolution has a residual or an activation, and a gate two "
                    "inputs");
    STD_TORCH_CHECK(!gates || (r.kernel[0] == 1 && r.kernel[1] == 1 && r.stride[0] == 1 &&
                               r.stride[1] == 1 && r.padding[0] == 0 && r.padding[1] == 0),
                    "steps: a gate scales pixel by pixel");
    Value& from = values_[r.in];
    const bool grouped = r.groups > 1 && r.kind == Kind::direct && r.filters % r.groups == 0 &&
                         from.channels % r.groups == 0;
    STD_TORCH_CHECK(r.groups == 1 || grouped,
                    "steps: groups divide the channels and filters of a direct convolution");
    Step s{r.kind, r.in, r.residual, r.out, static_cast<Act>(r.act)};
    Geometry& g = s.g;
    g.batch = x_.size(0);
    g.channels = from.channels;
    STD_TORCH_CHECK(!pads || r.filters >= from.channels, "steps: fewer channels than there are");
    STD_TORCH_CHECK(
        !pads || (r.kernel[0] == 1 && r.kernel[1] == 1 && r.padding[0] == 0 && r.padding[1] == 0),
        "steps: channels are added pixel by pixel");
    g.filters = convolves || pads ? r.filters : from.channels;
    g.groups = r.groups;
    g.in = {1, from.height, from.width};
    g.kernel = g.stride = g.dilation = g.out = {1, 1, 1};
    if (r.kind != Kind::mean) {
      constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every coordinate far from overflow
      for (int d = 0; d < 2; ++d) {
        g.kernel[d + 1] = r.kernel[d];
        g.stride[d + 1] = r.stride[d];
        g.padding[d + 1] = r.padding[d];
        g.dilation[d + 1] = r.dilation[d];
        STD_TORCH_CHECK(r.kernel[d] > 0 && r.kernel[d] < kLimit && r.stride[d] > 0 &&
                            r.stride[d] < kLimit && r.padding[d] >= 0 && r.padding[d] < kLimit &&
                            r.dilation[d] > 0 && r.dilation[d] < kLimit,
                        "steps: a window out of range");
        g.out[d + 1] =
            conv_output_size(g.in[d + 1], r.kernel[d], r.stride[d], r.padding[d], r.dilation[d]);
        STD_TORCH_CHECK(g.out[d + 1] > 0, "steps: a window larger than the padded input");
      }
    }
    if (r.kind == Kind::max_pool) {
      STD_TORCH_CHECK(2 * r.padding[0] <= r.kernel[0] && 2 * r.padding[1] <= r.kernel[1],
                      "steps: a padding of more than half the window");
    }
    if (convolves) {
      if constexpr (kIsBytes) {
        bind_int8(s, r, constants);
      } else {
        bind(s, r, constants);
      }
    }
    from.last = i;
    ++from.reads;
    values_[r.out] = {g.filters, g.out[1], g.out[2], i, i};
    if (r.residual >= 0) {
      Value& added = values_[r.residual];
      const Value& out = values_[r.out];
      const int64_t height = gates ? 1 : out.height, width = gates ? 1 : out.width;
      STD_TORCH_CHECK(
          added.channels == out.channels && added.height == height && added.width == width,
          "steps: expected a residual of the output's shape, or one value a channel");
      added.last = i;
      ++added.reads;
    }
    steps_.push_back(s);
  }

  // Packed weight, weight, scale, shift, and zero, residual's factor, inverse and zero of the
  // output.
  void bind_int8(Step& s, const Record& r, const std::vector<Tensor>& constants) {
    const Geometry& g = s.g;
    STD_TORCH_CHECK(r.filters > 0 && r.constants >= 0 &&
                        r.constants + 5 <= static_cast<int64_t>(constants.size()),
                    "steps: constants out of range");
    const Tensor* const c = constants.data() + r.constants;
    const int64_t sizes[5] = {int8_packed_size(g), c[1].numel(), g.filters, g.filters, 4};
    for (int i = 0; i < 5; ++i) {
      const ScalarType type = i < 2 ? ScalarType::Char : ScalarType::Float;
      STD_TORCH_CHECK(c[i].is_cpu() && c[i].scalar_type() == type && c[i].is_contiguous() &&
                          c[i].numel() == sizes[i],
                      "constants: expected what an 8-bit convolution of this size takes");
    }
    STD_TORCH_CHECK(g.depth() <= kInt8Depth, "steps: too deep for sums of 32 bits");
    s.packed = c[0].const_data_ptr();
    s.scale = data_of<float>(c[2]);
    s.shift = data_of<float>(c[3]);
    const float* const grid = data_of<float>(c[4]);
    const bool valid = grid[0] >= 0 && grid[0] <= 255 && grid[2] > 0;
    STD_TORCH_CHECK(valid, "constants: expected a zero of 0 to 255 and a positive factor");
    s.grid = {static_cast<uint8_t>(grid[0]), grid[1], grid[2], grid[3]};
  }

  void bind(Step& s, const Record& r, const std::vector<Tensor>& constants) {
    const Geometry& g = s.g;
    STD_TORCH_CHECK(r.filters > 0 && r.constants >= 0 &&
                        r.constants + 4 <= static_cast<int64_t>(constants.size()),
                    "steps: constants out of range");
    const Tensor* const c = constants.data() + r.constants;
    const bool is_direct = r.kind == Kind::direct;
    STD_TORCH_CHECK(!is_direct || kIsFloat || has_direct_bf16(),
                    "steps: this CPU does not multiply bfloat16");
    const DirectPacked form =
        is_direct ? direct_packed(kType, g.filters, g.group_channels(), g.taps(), g.groups)
                  : DirectPacked{false, ScalarType::Float, 0};
    const ScalarType types[4] = {form.dtype, kType, ScalarType::Float, ScalarType::Float};
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(c[i].is_cpu() && c[i].scalar_type() == types[i],
                      "constants: expected CPU tensors, scale and shift in float32, others in the "
                      "dtype of x");
      STD_TORCH_CHECK(i == 1 || c[i].is_contiguous(), "constants: expected dense tensors");
    }
    const Tensor& weight = c[1];
    if (is_direct) {
      STD_TORCH_CHECK(c[0].numel() == form.size, "constants: expected what _direct_weight returns");
      s.packed = c[0].const_data_ptr();
    } else {
      const bool plain = g.kernel == std::array<int64_t, 3>{1, 3, 3} && g.taps() == 9 &&
                         g.stride == g.dilation && g.stride == std::array<int64_t, 3>{1, 1, 1};
      STD_TORCH_CHECK(plain, "steps: Winograd's algorithm takes 3x3 kernels at stride 1");
      STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == g.filters &&
                          weight.size(1) == g.channels && weight.size(2) == 3 &&
                          weight.size(3) == 3,
                      "constants: expected a weight of shape [K, C, 3, 3]");
      STD_TORCH_CHECK(
          c[0].numel() == winograd_packed_size(g.filters, g.channels, static_cast<int64_t>(r.kind)),
          "constants: expected what _winograd_weight returns");
      for (int d = 0; d < 4; ++d) s.weight_step[d] = weight.stride(d);
      s.weight = data_of<T>(weight);
      s.packed = data_of<float>(c[0]);
    }
    STD_TORCH_CHECK(c[2].numel() == g.filters && c[3].numel() == g.filters,
                    "constants: expected a scale and a shift a filter");
    s.scale = data_of<float>(c[2]);
    s.shift = data_of<float>(c[3]);
  }

  // The value that a step may write over, the last to read it; -1 where there is none.
  int64_t overwritten(const Step& s, int64_t i) const {
    if (s.kind == Kind::gate) {
      return s.in > 0 && s.in != s.residual && values_[s.in].last == i ? s.in : -1;
    }
    return overwrites_residual(s, i) ? s.residual : -1;
  }

  // Writing over the residual: each value is read, and then written, by one thread, from registers.
  // Winograd's kernel may come back to a tile, and reads it again.
  bool overwrites_residual(const Step& s, int64_t i) const {
    return s.kind == Kind::direct && s.residual > 0 && s.residual != s.in &&
           values_[s.residual].last == i && s.g.groups == 1 && s.g.filters % 32 == 0 &&
           clamp_of(s.act).is_clamp && (!kIsBytes || has_int8_vnni());
  }

  // A place for every value but the input and the result: the lowest gap among what lives.
  void place() {
    std::vector<const Value*> live;  // by place
    const int64_t batch = x_.size(0);
    for (int64_t i = 0; i + 1 < static_cast<int64_t>(steps_.size()); ++i) {
      const Step& s = steps_[i];
      Value& out = values_[s.out];
      constexpr int64_t kLine = 64 / sizeof(T);  // values in a line of the cache
      out.size = (out.count(batch) + kLine - 1) / kLine * kLine;
      std::erase_if(live, [&](const Value* v) { return v->last < i; });
      if (const int64_t over = overwritten(s, i); over >= 0) {
        const Value& under = values_[over];
        out.at = under.at;
        std::replace(live.begin(), live.end(), &under, static_cast<const Value*>(&out));
        continue;
      }
      int64_t at = 0;
      auto before = live.begin();
      for (; before != live.end() && at + out.size > (*before)->at; ++before) {
        at = (*before)->at + (*before)->size;
      }
      out.at = at;
      live.insert(before, &out);
      arena_size_ = std::max(arena_size_, at + out.size);
    }
  }

  Tensor x_;
  bool planar_ = false;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t arena_size_ = 0;
};

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

// Whether the watched tensors are as they were. Torch's threads share the misses of the caches.
bool is_unchanged(const Recording& r) {
  const auto count = static_cast<int64_t>(r.watched.size());
  std::atomic<bool> changed{false};
  parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
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
  });
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

// A vector of no elements where a watched tensor has changed.
Tensor run_sequence(const Tensor& x, int64_t number) {
  return with_sequence(x, number, [&](const Recording& recording, const auto& sequence, auto tag) {
    using T = typename decltype(tag)::type;
    if (!is_unchanged(recording)) return empty({0}, x.scalar_type(), x);
    const Tensor y = sequence.output();
    if (y.numel() == 0) return y;
    const Tensor arena = empty_packed(sequence.arena_size(), x.scalar_type(), x);
    sequence.run(mutable_data_of<T>(arena), mutable_data_of<T>(y));
    return y;
  });
}

int64_t sequence_bytes(const Tensor& x, int64_t number) {
  return with_sequence(x, number, [](const Recording&, const auto& sequence, auto tag) {
    return sequence.arena_size() * int64_t(sizeof(typename decltype(tag)::type));
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
