// conv_bn_act over weights packed once, fp32 and bf16: the ops, and the fp32 kernel of the matrix
// product. How its work is laid out is in direct.h; narrow groups have a kernel of their own
// (grouped.h).
#include "band.h"
#include "direct.h"
#include "grouped.h"
#include "pool.h"

namespace resnet_fast::cpu {
namespace {

template <Isa I>
struct DirectFp32 {
  using T = float;
  using Packed = float;
  static constexpr bool kFinishes = true;
  static constexpr int64_t kBlock = 2 * Tile<I>::kBytes / 4, kPair = 1;
  static constexpr int64_t kDepth = Panel<float>::kDepth, kBandRows = 4;
  static constexpr int kRows = Tile<I>::kRows;
  static constexpr bool kBlockStays = I != Isa::avx512;
  // A panel is one chain (tile.h): of the limit at ResNet's sites that takes 0.46 at most, where
  // chains of 64 take 0.43 and two percent of a network's time.
  static constexpr int64_t kChain = Panel<float>::kDepth;

  static void multiply(int64_t count, const Rows& rows, const float* packed, int64_t depth,
                       const TileOut<float>& out, bool half) {
    const auto& table = half ? kMultiplyRows<I, 1> : kMultiplyRows<I>;
    table[count - 1](rows, packed, depth, out);
  }
};

void check_dtype(const char* name, const Tensor& t) {
  const bool bf16_here = t.scalar_type() == ScalarType::BFloat16 && has_direct_bf16();
  STD_TORCH_CHECK(t.is_cpu() && (t.scalar_type() == ScalarType::Float || bf16_here), name,
                  ": expected a CPU tensor of float32, or bfloat16 where the CPU multiplies it");
}

Tensor direct_weight(const Tensor& weight, int64_t groups) {
  check_dtype("weight", weight);
  STD_TORCH_CHECK(weight.dim() >= 3 && weight.dim() <= 5, "weight: expected 3 to 5 dimensions");
  const int64_t filters = weight.size(0), channels = weight.size(1);
  STD_TORCH_CHECK(groups > 0 && filters % groups == 0,
                  "groups: expected a positive divisor of the filters");
  int64_t taps = 1;
  for (int64_t d = 2; d < weight.dim(); ++d) taps *= weight.size(d);
  const Tensor dense = as_format(weight, MemoryFormat::Contiguous);
  const DirectPacked form = direct_packed(weight.scalar_type(), filters, channels, taps, groups);
  const Tensor packed = empty_packed(form.size, form.dtype, weight);
  const bool is_bf16 = weight.scalar_type() == ScalarType::BFloat16;
  if (form.narrow) {
    auto* const to = mutable_data_of<float>(packed);
    if (is_bf16) {
      pack_grouped(data_of<bf16>(dense), filters, channels, taps, to);
    } else {
      pack_grouped(data_of<float>(dense), filters, channels, taps, to);
    }
  } else if (is_bf16) {
    pack_direct_bf16(data_of<bf16>(dense), filters, channels, taps, groups,
                     mutable_data_of<bf16>(packed));
  } else {
    run_on_isa([&](auto isa) {
      pack_direct<DirectFp32<decltype(isa)::value>>(data_of<float>(dense), filters, channels, taps,
                                                    groups, mutable_data_of<float>(packed));
    });
  }
  return packed;
}

Tensor direct_conv(const Tensor& x, const Tensor& packed, const Tensor& weight,
                   const OptTensor& scale, const OptTensor& shift, const OptTensor& residual,
                   IntList stride, IntList padding, IntList dilation, int64_t groups,
                   const std::string& act_name) {
  const Act act = parse_act(act_name);
  const Geometry g = checked_geometry(x, weight, stride, padding, dilation, groups);
  check_dtype("x", x);
  STD_TORCH_CHECK(x.dim() == 4 || (x.dim() == 5 && groups == 1),
                  "x: expected rank 4, or 5 with one group");
  const DirectPacked form =
      direct_packed(x.scalar_type(), g.filters, g.group_channels(), g.taps(), groups);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == form.dtype && packed.is_contiguous() &&
                      packed.numel() == form.size,
                  "packed: expected what _direct_weight returns for this weight");
  if (scale) check_channel_vector("scale", *scale, x, g.filters);
  if (shift) check_channel_vector("shift", *shift, x, g.filters);
  std::vector<int64_t> shape = {g.batch, g.filters};
  for (int64_t axis = 5 - x.dim(); axis < 3; ++axis) shape.push_back(g.out[axis]);
  const Tensor y = empty_channels_last(shape, x);
  if (residual) check_matches("residual", *residual, y);
  if (y.numel() == 0) return y;

  const Tensor dense = channels_last_memory(x);
  const Tensor added = residual ? channels_last_memory(*residual) : Tensor();
  const auto a = channel_values<float>(scale, g.filters, 1.0f);
  const auto b = channel_values<float>(shift, g.filters, 0.0f);
  const auto go = [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* const r = residual ? data_of<T>(added) : nullptr;
    run_direct<T>(g, {data_of<T>(dense), packed.const_data_ptr(), a.data(), b.data(), r,
                      mutable_data_of<T>(y), act});
  };
  if (x.scalar_type() == ScalarType::BFloat16) {
    go(TypeTag<bf16>{});
  } else {
    go(TypeTag<float>{});
  }
  return y;
}

}  // namespace

DirectPacked direct_packed(ScalarType dtype, int64_t filters, int64_t channels, int64_t taps,
                           int64_t groups) {
  if (groups > 1 && is_narrow(dtype, channels, filters / groups)) {
    return {true, ScalarType::Float, grouped_packed_size(filters, channels, taps)};
  }
  const int64_t size = dtype == ScalarType::BFloat16
                           ? direct_bf16_packed_size(filters, channels, taps, groups)
                           : direct_fp32_packed_size(filters, channels, taps, groups);
  return {false, dtype, size};
}

template <typename T>
void run_direct(const Geometry& g, const DirectOperands<T>& o) {
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  const ScalarType dtype = kIsFloat ? ScalarType::Float : ScalarType::BFloat16;
  if (g.groups > 1 && is_narrow(dtype, g.group_channels(), g.group_filters())) {
    return grouped(g, o);
  }
  direct(g, o);
}

template void run_direct(const Geometry& g, const DirectOperands<float>& o);
template void run_direct(const Geometry& g, const DirectOperands<bf16>& o);

int64_t direct_fp32_packed_size(int64_t filters, int64_t channels, int64_t taps, int64_t groups) {
  int64_t size = 0;
  run_on_isa([&](auto isa) {
    size = direct_packed_size<DirectFp32<decltype(isa)::value>>(filters, channels, taps, groups);
  });
  return size;
}

void direct(const Geometry& g, const DirectOperands<float>& o) {
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    if (reads_bands(g)) {
      return parallel_on<kIsa>(band_tasks<DirectFp32<kIsa>>(g),
                               [&](int64_t begin, int64_t end)
                                   RF_INLINE { direct_bands<DirectFp32<kIsa>>(g, o, begin, end); });
    }
    const DirectCut cut(g, DirectFp32<kIsa>::kBlock, worker_count());
    parallel_on<kIsa>(g.groups * cut.chunks * cut.strips,
                      [&](int64_t begin, int64_t end)
                          RF_INLINE { direct_tasks<DirectFp32<kIsa>>(g, o, cut, begin, end); });
  });
}

}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_direct_weight", TORCH_BOX(&resnet_fast::cpu::direct_weight));
  m.impl("_direct_conv", TORCH_BOX(&resnet_fast::cpu::direct_conv));
}
