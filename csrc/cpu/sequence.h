// The layers of a network as one call: what each is was decided, verified and written down as a
// list of steps (resnet_fast/nn/recorder.py); here they run one after the other.
//
// Between the layers there is no Python, no allocation and no fork of threads: one team stays
// together, and all activations live in one block, the arena. A layer that adds a residual whose
// last use this is writes over it, and a gate over what it scales; a norm whose value a convolution
// of one tap alone reads is applied by that convolution, as it reads.
#pragma once

#include "arena.h"
#include "band.h"
#include "int8.h"
#include "pixels.h"
#include "pool.h"
#include "stripes.h"
#include "team.h"
#include "window_pool.h"
#include "winograd.h"

namespace resnet_fast::cpu {

enum class Kind : int64_t {
  direct = 0,
  max_pool = 1,
  winograd2 = 2,
  mean = 3,
  winograd4 = 4,
  pad_channels = 5,  // every stride-th pixel, zeros for the channels that are new
  gate = 6,          // the input times the second one, which has one value a channel
  affine = 7,        // act(x * scale + shift), a channel each: a norm by itself
  average_pool = 8,
  join = 9  // the channels of the input, then those of the second one
};

// One step as the list holds it. Values are numbered; value 0 is the network's input.
struct Record {
  Kind kind;
  int64_t in, second, out;  // values; second: a residual, a gate's factors, what is joined; or -1
  int64_t constants;        // index of the first: packed, weight, scale, shift; or scale, shift
  int64_t act;
  int64_t filters;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups;
};
constexpr int64_t kFields = sizeof(Record) / sizeof(int64_t);
static_assert(sizeof(Record) == 16 * sizeof(int64_t));

inline bool convolves(Kind kind) {
  return kind == Kind::direct || kind == Kind::winograd2 || kind == Kind::winograd4;
}
inline bool pools(Kind kind) { return kind == Kind::max_pool || kind == Kind::average_pool; }

struct Step {
  Kind kind;
  int64_t in, second, out;
  Act act;
  Geometry g{};
  const void *packed = nullptr, *weight = nullptr;
  const float *scale = nullptr, *shift = nullptr;
  int64_t weight_step[4] = {};
  Requantize grid = {0, 1, 1, 0};
  Affine before = {};                 // what the input is put through as it is read
  bool is_folded = false;             // is done by the step that reads it
  int64_t wide = -1, depthwise = -1;  // the steps that are done with this one, in stripes
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

  // For inputs of `size`, [N, C, H, W], and as many threads as there are now. The constants outlive
  // it.
  Sequence(const std::array<int64_t, 4>& size, const std::vector<Tensor>& constants,
           IntList records)
      : batch_(size[0]) {
    const auto fields = static_cast<int64_t>(records.size());
    STD_TORCH_CHECK(fields > 0 && fields % kFields == 0, "steps: expected ", kFields,
                    " integers a step");
    const int64_t count = fields / kFields;
    arena_.add({size[1], size[2], size[3]});
    steps_.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      Record r;
      std::memcpy(&r, records.data() + i * kFields, sizeof(r));
      add(i, r, constants);
    }
    if constexpr (!kIsBytes) {
      fold_norms();
      find_stripes();
      join_parts();
    }
    place();
  }

  int64_t arena_size() const { return arena_.size(); }

  // Whether it also takes inputs in NCHW: a stem reads its bands from either layout.
  bool takes_planar() const {
    return arena_[0].reads == 1 && steps_[0].kind == Kind::direct && reads_bands(steps_[0].g);
  }

  // The size of the output.
  std::array<int64_t, 4> output() const {
    const Value& last = arena_[steps_.back().out];
    return {batch_, last.channels, last.height, last.width};
  }

  // y of x, which is channels-last unless it is planar. `memory` holds arena_size() elements. The
  // team runs the errand, if there is one, meanwhile.
  void run(const T* x, bool planar, T* memory, T* y, Errand* errand) const {
    const int64_t result = steps_.back().out;
    const auto at = [&](int64_t value) -> T* {
      const Value& v = arena_[value];
      return (v.whole == result ? y : memory + arena_[v.whole].at) + v.channel;
    };
    const auto drive = [&] {
      for (const Step& s : steps_) {
        if (s.is_folded) continue;
        const int64_t read = first_read(s);
        const T* in = read == 0 ? x : at(read);
        const T* second = s.second < 0 ? nullptr : s.second == 0 ? x : at(s.second);
        run_step(s, in, read == 0 && planar, second, at(s.out));
      }
    };
    Team::run(drive, errand);
  }

 private:
  void run_step(const Step& s, const T* in, bool planar, const T* second, T* out) const {
    if constexpr (kIsBytes) {
      if (s.kind == Kind::max_pool) return max_pool(s.g, in, out);
      return run_int8(s.g, {in, s.packed, s.scale, s.shift, second, out, s.act, planar, s.grid});
    } else {
      run_float_step(s, in, planar, second, out);
    }
  }

  void run_float_step(const Step& s, const T* in, bool planar, const T* second, T* out) const {
    const int64_t pixels = s.g.in[1] * s.g.in[2];
    switch (s.kind) {
      case Kind::direct: {
        const DirectOperands<T> o = operands(s, in, planar, second, out);
        return s.wide < 0 ? run_direct<T>(s.g, o) : in_stripes(s, in, o);
      }
      case Kind::winograd2:
      case Kind::winograd4: {
        WinogradOperands<T> o{in,
                              static_cast<const float*>(s.packed),
                              static_cast<const T*>(s.weight),
                              {},
                              s.scale,
                              s.shift,
                              second,
                              out,
                              s.act};
        std::copy_n(s.weight_step, 4, o.weight_step);
        return winograd(s.g, static_cast<int64_t>(s.kind), o);
      }
      case Kind::max_pool:
        return max_pool(s.g, in, out);
      case Kind::average_pool:
        return average_pool(s.g, in, out);
      case Kind::pad_channels:
        return pad_channels(s.g, in, out);
      case Kind::mean:
        return mean_pool(s.g.batch, pixels, s.g.channels, s.g.x_step(), in, out);
      case Kind::gate:
        return gate_channels(s.g.batch, pixels, s.g.channels, in, second, out);
      case Kind::affine:
        return affine_pixels(s.g, in, s.scale, s.shift, s.act, out);
      case Kind::join:
        join(s, s.in, 0, in, out);
        return join(s, s.second, s.g.channels, second, out + s.g.channels);
    }
  }

  static DirectOperands<T> operands(const Step& s, const T* in, bool planar, const T* second,
                                    T* out) {
    return {in, s.packed, s.scale, s.shift, second, out, s.act, planar, {0, 1, 1, 0}, s.before};
  }

  // `in` is what the first of the steps reads.
  void in_stripes(const Step& s, const T* in, const DirectOperands<T>& o) const {
    const auto layer = [&](int64_t i) {
      const Step& step = steps_[i];
      return StripeLayer<T>{step.g, operands(step, in, false, nullptr, nullptr)};
    };
    const StripeLayer<T> self{s.g, o};
    if (s.depthwise < 0) return run_stripes<T>(layer(s.wide), self, nullptr);
    run_stripes<T>(layer(s.wide), layer(s.depthwise), &self);
  }

  // What of a join has to be copied: a value that has no place in the whole.
  void join(const Step& s, int64_t value, int64_t channel, const T* from, T* to) const {
    if (arena_.lies_in(value, s.out, channel)) return;
    Geometry g = s.g;
    g.channels = arena_[value].channels;
    g.x_pitch = arena_.pitch(value);
    copy_pixels(g, from, to);
  }

  // The steps of a list come in the order of their results: step i makes value i + 1, from values
  // made before it.
  void add(int64_t i, const Record& r, const std::vector<Tensor>& constants) {
    check(i, r);
    const Value from = arena_[r.in];
    Step s{r.kind, r.in, r.second, r.out, static_cast<Act>(r.act)};
    Geometry& g = s.g;
    g.batch = batch_;
    g.channels = from.channels;
    g.filters = convolves(r.kind) || r.kind == Kind::pad_channels ? r.filters : from.channels;
    g.groups = r.groups;
    g.in = {1, from.height, from.width};
    g.kernel = g.stride = g.dilation = g.out = {1, 1, 1};
    if (r.kind != Kind::mean) {
      for (int d = 0; d < 2; ++d) {
        g.kernel[d + 1] = r.kernel[d];
        g.stride[d + 1] = r.stride[d];
        g.padding[d + 1] = r.padding[d];
        g.dilation[d + 1] = r.dilation[d];
        g.out[d + 1] =
            conv_output_size(g.in[d + 1], r.kernel[d], r.stride[d], r.padding[d], r.dilation[d]);
        STD_TORCH_CHECK(g.out[d + 1] > 0, "steps: a window larger than the padded input");
      }
    }
    if (convolves(r.kind)) {
      if constexpr (kIsBytes) {
        bind_int8(s, r, constants);
      } else {
        bind(s, r, constants);
      }
    }
    if (r.kind == Kind::affine) bind_affine(s, r, constants);
    if (r.kind == Kind::join) g.filters += arena_[r.second].channels;
    arena_.read(r.in, i);
    arena_.add({g.filters, g.out[1], g.out[2], i});
    if (r.second >= 0) {
      const Value& added = arena_[r.second];
      const bool gates = r.kind == Kind::gate;
      STD_TORCH_CHECK((added.channels == g.filters || r.kind == Kind::join) &&
                          added.height == (gates ? 1 : g.out[1]) &&
                          added.width == (gates ? 1 : g.out[2]),
                      "steps: expected a residual of the output's shape, one value a channel for a "
                      "gate, images of one size to join");
      arena_.read(r.second, i);
    }
    steps_.push_back(s);
  }

  // What of a step can be seen without its constants.
  void check(int64_t i, const Record& r) const {
    STD_TORCH_CHECK(r.kind >= Kind::direct && r.kind <= Kind::join, "steps: unknown kind");
    STD_TORCH_CHECK(r.out == i + 1 && r.in >= 0 && r.in <= i && r.second >= -1 && r.second <= i,
                    "steps: a step reads what the steps before it wrote");
    STD_TORCH_CHECK(!kIsBytes || r.kind == Kind::direct || r.kind == Kind::max_pool,
                    "steps: bytes are convolved directly, or pooled");
    STD_TORCH_CHECK(r.act >= 0 && r.act < kActCount, "steps: unknown activation");
    const bool pads = r.kind == Kind::pad_channels;
    const bool takes_two = r.kind == Kind::gate || r.kind == Kind::join;
    STD_TORCH_CHECK(convolves(r.kind) ||
                        ((r.second >= 0) == takes_two && (r.act == 0 || r.kind == Kind::affine)),
                    "steps: only a convolution has a residual, it or a norm an activation, and a "
                    "gate or a join two inputs");
    const bool windows = convolves(r.kind) || pools(r.kind);
    for (int d = 0; d < 2; ++d) {
      constexpr int64_t kLimit = int64_t(1) << 31;  // keeps every coordinate far from overflow
      STD_TORCH_CHECK(r.kernel[d] > 0 && r.kernel[d] < kLimit && r.stride[d] > 0 &&
                          r.stride[d] < kLimit && r.padding[d] >= 0 && r.padding[d] < kLimit &&
                          r.dilation[d] > 0 && r.dilation[d] < kLimit,
                      "steps: a window out of range");
      STD_TORCH_CHECK(
          windows || (r.kernel[d] == 1 && r.padding[d] == 0 && (r.stride[d] == 1 || pads)),
          "steps: expected pixel by pixel");
      STD_TORCH_CHECK(!pools(r.kind) || 2 * r.padding[d] <= r.kernel[d],
                      "steps: a padding of more than half the window");
      STD_TORCH_CHECK(r.kind != Kind::average_pool || r.dilation[d] == 1,
                      "steps: a mean over pixels that are apart");
    }
    const int64_t channels = arena_[r.in].channels;
    const bool grouped = r.groups > 1 && r.kind == Kind::direct && r.filters % r.groups == 0 &&
                         channels % r.groups == 0;
    STD_TORCH_CHECK(r.groups == 1 || grouped,
                    "steps: groups divide the channels and filters of a direct convolution");
    STD_TORCH_CHECK(!pads || r.filters >= channels, "steps: fewer channels than there are");
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

  // Scale and shift.
  void bind_affine(Step& s, const Record& r, const std::vector<Tensor>& constants) {
    STD_TORCH_CHECK(r.constants >= 0 && r.constants + 2 <= static_cast<int64_t>(constants.size()),
                    "steps: constants out of range");
    for (int64_t i = r.constants; i < r.constants + 2; ++i) {
      const Tensor& c = constants[i];
      STD_TORCH_CHECK(c.is_cpu() && c.scalar_type() == ScalarType::Float && c.is_contiguous() &&
                          c.numel() == s.g.channels,
                      "constants: expected a scale and a shift a channel, in float32");
    }
    s.scale = data_of<float>(constants[r.constants]);
    s.shift = data_of<float>(constants[r.constants + 1]);
  }

  // A norm that a convolution of one tap alone reads is done as that one reads.
  void fold_norms() {
    for (Step& s : steps_) {
      if (s.kind != Kind::direct || !takes_affine(s.g) || s.in == 0) continue;
      Step& norm = steps_[s.in - 1];
      const Clamp clamp = clamp_of(norm.act);
      if (norm.kind != Kind::affine || arena_[s.in].reads != 1 || !clamp.is_clamp) continue;
      s.before = {norm.scale, norm.shift, clamp.low, clamp.high};
      s.in = norm.in;
      norm.is_folded = true;
      arena_[s.in].last = std::max(arena_[s.in].last, s.out - 1);
    }
  }

  // Where a depthwise convolution is better done together with the pointwise ones around it.
  void find_stripes() {
    const int64_t threads = worker_count();
    for (Step& s : steps_) {
      if (s.kind != Kind::direct || s.second >= 0 || s.in == 0 || arena_[s.in].reads != 1) continue;
      Step& wide = steps_[s.in - 1];
      if (wide.kind != Kind::direct || wide.second >= 0 || wide.wide >= 0 ||
          !runs_in_stripes<T>(wide.g, s.g, threads)) {
        continue;
      }
      Step* last = &s;
      for (Step& next : steps_) {
        const bool reads = next.in == s.out && arena_[s.out].reads == 1;
        if (reads && next.kind == Kind::direct && is_pointwise(next.g)) last = &next;
      }
      wide.is_folded = true;
      last->wide = wide.out - 1;
      if (last != &s) {
        s.is_folded = true;
        last->depthwise = s.out - 1;
      }
      arena_[wide.in].last = std::max(arena_[wide.in].last, last->out - 1);
    }
  }

  // The value that a step, or the first of those that are done with it, reads.
  int64_t first_read(const Step& s) const { return s.wide < 0 ? s.in : steps_[s.wide].in; }

  // Whether a step's kernel takes pixels of its input that are more than its channels apart.
  static bool reads_apart(const Step& s) {
    if (s.kind == Kind::direct) return s.g.groups == 1;
    return s.kind != Kind::gate && s.kind != Kind::pad_channels;
  }

  // The same of its output. A residual lies as the output does, and is dense.
  static bool writes_apart(const Step& s) {
    if (convolves(s.kind) && s.second >= 0) return false;
    return reads_apart(s) && s.kind != Kind::mean;
  }

  // Puts what is joined side by side, from the last join to the first, so that a whole has its
  // place before its parts.
  void join_parts() {
    std::vector<char> may_be_part(steps_.size() + 1, true);
    may_be_part[0] = false;  // a tensor of its own
    for (const Step& s : steps_) {
      if (!reads_apart(s) && !s.is_folded) may_be_part[s.in] = false;
      if (!writes_apart(s)) may_be_part[s.out] = false;
      if (s.second >= 0 && s.kind != Kind::join) may_be_part[s.second] = false;
    }
    for (auto s = steps_.rbegin(); s != steps_.rend(); ++s) {
      if (s->kind != Kind::join) continue;
      for (const auto& [value, channel] :
           {std::pair{s->in, int64_t(0)}, {s->second, s->g.channels}}) {
        if (may_be_part[value] && !arena_.is_part(value)) arena_.make_part(value, s->out, channel);
      }
    }
  }

  // The value that a step may write over, the last to read it; -1 where there is none.
  int64_t overwritten(const Step& s, int64_t i) const {
    if (s.kind == Kind::gate) {
      return s.in > 0 && s.in != s.second && arena_[s.in].last == i ? s.in : -1;
    }
    return overwrites_residual(s, i) ? s.second : -1;
  }

  // Writing over the residual: each value is read, and then written, by one thread, from registers.
  // Winograd's kernel may come back to a tile, and reads it again.
  bool overwrites_residual(const Step& s, int64_t i) const {
    return s.kind == Kind::direct && s.second > 0 && s.second != first_read(s) &&
           arena_[s.second].last == i && s.g.groups == 1 && s.g.filters % 32 == 0 &&
           clamp_of(s.act).is_clamp && (!kIsBytes || has_int8_vnni());
  }

  // A place for every value but the input and the result.
  void place() {
    constexpr int64_t kLine = 64 / sizeof(T);  // values in a line of the cache
    const int64_t result = steps_.back().out;
    for (Step& s : steps_) {
      s.g.x_pitch = arena_.pitch(s.in);
      s.g.y_pitch = arena_.pitch(s.out);
      if (s.is_folded || arena_[s.out].whole == result) continue;
      const int64_t i = s.out - 1;
      arena_.place(s.out, i, overwritten(s, i), batch_, kLine);
    }
  }

  const int64_t batch_;
  Arena arena_;
  std::vector<Step> steps_;
};

}  // namespace resnet_fast::cpu
