// The only file that includes torch headers: the LibTorch stable ABI, target torch 2.11, and the
// few helpers on top of it that every backend needs.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "math/activation.h"
#include "math/round.h"

namespace resnet_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using IntList = torch::headeronly::IntHeaderOnlyArrayRef;

inline Act parse_act(std::string_view name) {
  for (int code = 0; code < kActCount; ++code) {
    if (name == kActNames[code]) return static_cast<Act>(code);
  }
  STD_TORCH_CHECK(false, "act: unknown activation '", std::string(name), "'");
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// dtype of scale, shift, mean and rstd beside a tensor of `dtype`.
inline ScalarType stat_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>{}), T one of float, double, bf16, fp16 (csrc/math/round.h).
template <typename F>
void dispatch_dtype(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeTag<float>{});
    case ScalarType::Double:
      return f(TypeTag<double>{});
    case ScalarType::BFloat16:
      return f(TypeTag<bf16>{});
    case ScalarType::Half:
      return f(TypeTag<fp16>{});
    default:
      STD_TORCH_CHECK(false, "dtype not supported");
  }
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline bool same_shape(const Tensor& a, const Tensor& b) { return shape_of(a) == shape_of(b); }

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

// Tensor::is_contiguous(memory_format=channels_last[_3d]), which the stable ABI lacks.
inline bool is_channels_last(const Tensor& t) {
  const int64_t rank = t.dim();
  if (rank != 4 && rank != 5) return false;
  int64_t expected = 1;
  const auto matches = [&](int64_t d) {
    if (t.size(d) == 1) return true;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
    return true;
  };
  if (!matches(1)) return false;
  for (int64_t d = rank - 1; d >= 2; --d) {
    if (!matches(d)) return false;
  }
  return matches(0);
}

inline MemoryFormat channels_last_format(int64_t rank) {
  return rank == 4   ? MemoryFormat::ChannelsLast
         : rank == 5 ? MemoryFormat::ChannelsLast3d
                     : MemoryFormat::Contiguous;
}

// The package's rule: channels-last when x is so and not also contiguous, else contiguous.
inline MemoryFormat output_format(const Tensor& x) {
  return is_channels_last(x) && !x.is_contiguous() ? channels_last_format(x.dim())
                                                   : MemoryFormat::Contiguous;
}

inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& device_of,
                    MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(IntList(sizes.data(), sizes.size()), dtype, std::nullopt,
                              device_of.device(), std::nullopt, format);
}

// An output like x: its shape and dtype, in output_format(x).
inline Tensor empty_output(const Tensor& x) {
  return empty(shape_of(x), x.scalar_type(), x, output_format(x));
}

// Dense memory in exactly that format; no copy when it is so already.
inline Tensor as_format(const Tensor& t, MemoryFormat format) {
  return torch::stable::contiguous(t, format);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Typed data pointers over the package's storage types, which share torch's bit layout.
template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* data_of(const OptTensor& t) {
  return t ? data_of<T>(*t) : nullptr;
}

// A CPU channel vector as dense values; `missing` for each channel when it is absent.
template <typename A>
std::vector<A> channel_values(const OptTensor& t, int64_t channels, A missing) {
  if (!t) return std::vector<A>(channels, missing);
  const Tensor dense = as_format(*t, MemoryFormat::Contiguous);
  const A* values = data_of<A>(dense);
  return std::vector<A>(values, values + channels);
}

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);

// A fork and a join, told to ThreadSanitizer: it sees those of this library, but not of OpenMP's.
template <typename F>
class Traced {
 public:
  explicit Traced(const F& f) : f_(f) { __tsan_release(this); }
  ~Traced() { __tsan_acquire(this); }
  void operator()(int64_t begin, int64_t end) const {
    void* const fork = const_cast<Traced*>(this);
    __tsan_acquire(fork);
    f_(begin, end);
    __tsan_release(fork);
  }

 private:
  const F& f_;
};
#else
template <typename F>
const F& Traced(const F& f) {
  return f;
}
#endif

// Splits [begin, end) over torch's thread pool; f(begin, end).
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin < end) torch::stable::parallel_for(begin, end, grain, Traced(f));
}

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

#if defined(USE_CUDA)
// The current stream of the tensor's device, as a cudaStream_t.
inline void* current_cuda_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}
using DeviceGuard = torch::stable::accelerator::DeviceGuard;
#endif

// Memory-safety guards shared by the backends. `device_ok` is the backend's device test.
inline void check_input(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.layout() == torch::headeronly::Layout::Strided, name,
                  ": expected a dense tensor");
  STD_TORCH_CHECK(is_supported(t.scalar_type()), name,
                  ": expected float32, float16, bfloat16 or float64");
}

// A tensor that is read element by element together with `like`.
inline void check_matches(const char* name, const Tensor& t, const Tensor& like) {
  check_input(name, t);
  STD_TORCH_CHECK(same_device(t, like), name, ": expected the same device as the input");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected the input's dtype");
  STD_TORCH_CHECK(same_shape(t, like), name, ": expected the same shape");
}

// A vector of one value a channel, in the statistics dtype of x.
inline void check_channel_vector(const char* name, const Tensor& t, const Tensor& x,
                                 int64_t channels) {
  check_input(name, t);
  STD_TORCH_CHECK(same_device(t, x), name, ": expected the same device as the input");
  STD_TORCH_CHECK(t.scalar_type() == stat_dtype(x.scalar_type()), name,
                  ": expected float32 (float64 beside a float64 input)");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels, name, ": expected ", channels,
                  " values in one dimension");
}

}  // namespace resnet_fast
