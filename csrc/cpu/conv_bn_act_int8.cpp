// The 8-bit convolution (int8.h): its ops, and the product for CPUs without an instruction for it,
// where 8 bits save memory but hardly time. Narrow groups have kernels of their own
// (conv_bn_act_int8_grouped.cpp).
#include "int8_linear.h"

#include "band.h"
#include "pool.h"

namespace resnet_fast::cpu {
namespace {

// 32-bit integers, and as many bytes. Written out for GCC 12 (lanes.h).
template <int kBytes>
struct Bytes;
template <>
struct Bytes<16> {
  typedef int32_t Sums __attribute__((vector_size(16)));
  typedef int8_t Signed __attribute__((vector_size(4)));
};
template <>
struct Bytes<32> {
  typedef int32_t Sums __attribute__((vector_size(32)));
  typedef int8_t Signed __attribute__((vector_size(8)));
};
template <>
struct Bytes<64> {
  typedef int32_t Sums __attribute__((vector_size(64)));
  typedef int8_t Signed __attribute__((vector_size(16)));
};

// The product of direct.h by 32-bit multiplications.
template <int kBytes, int MR, int NV>
RF_INLINE inline void multiply_rows_plain(const RowsOf<uint8_t>& rows, const int8_t* packed,
                                          int64_t depth, const TileOut<uint8_t>& out) {
  using Sums = typename Bytes<kBytes>::Sums;
  using Signed = typename Bytes<kBytes>::Signed;
  constexpr int kLanes = kBytes / 4, kPacked = 2;
  Sums acc[MR][NV] = {};
  const uint8_t* from = rows.at;
  for (int64_t left = depth; left > 0; left -= rows.run, from += rows.jump) {
    const int64_t count = std::min(left, rows.run);
    for (int64_t k = 0; k < count; ++k, packed += kPacked * kLanes) {
      Sums b[NV];
      for (int v = 0; v < NV; ++v) {
        Signed bytes;
        std::memcpy(&bytes, packed + v * kLanes, sizeof(bytes));
        b[v] = __builtin_convertvector(bytes, Sums);
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const int32_t a = from[i * rows.stride + k];
        for (int v = 0; v < NV; ++v) acc[i][v] += a * b[v];
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int v = 0; v < NV; ++v) {
      int32_t* to = out.sums + i * out.sums_stride + v * kLanes;
      if (out.accumulate) {
        Sums before;
        std::memcpy(&before, to, sizeof(before));
        acc[i][v] += before;
      }
      std::memcpy(to, &acc[i][v], sizeof(Sums));
    }
  }
}

using MultiplyRowsPlain = void (*)(const RowsOf<uint8_t>& rows, const int8_t* packed, int64_t depth,
                                   const TileOut<uint8_t>& out);

template <Isa I, int NV>
inline constexpr auto kMultiplyRowsPlain = []<int... R>(std::integer_sequence<int, R...>) {
  return std::array<MultiplyRowsPlain, sizeof...(R)>{[](const RowsOf<uint8_t>& rows,
                                                        const int8_t* packed, int64_t depth,
                                                        const TileOut<uint8_t>& out) {
    run_on<I>([&](auto) RF_INLINE {
      multiply_rows_plain<Tile<I>::kBytes, R + 1, NV>(rows, packed, depth, out);
    });
  }...};
}(std::make_integer_sequence<int, Tile<I>::kRows>{});

template <Isa I>
struct DirectPlain {
  using T = uint8_t;
  using Packed = int8_t;
  static constexpr bool kFinishes = false, kBlockStays = false;
  static constexpr int64_t kBlock = 2 * Tile<I>::kBytes / 4, kPair = 1;
  static constexpr int64_t kDepth = Panel<uint8_t>::kDepth, kBandRows = 4;
  static constexpr int kRows = Tile<I>::kRows;
  static constexpr int64_t kChain = std::numeric_limits<int64_t>::max();

  static void multiply(int64_t count, const RowsOf<uint8_t>& rows, const int8_t* packed,
                       int64_t depth, const TileOut<uint8_t>& out, bool half) {
    const auto& table = half ? kMultiplyRowsPlain<I, 1> : kMultiplyRowsPlain<I, 2>;
    table[count - 1](rows, packed, depth, out);
  }
};

void check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Char && weight.dim() == 4,
                  "weight: expected a CPU tensor of int8 with 4 dimensions");
}

Tensor int8_weight(const Tensor& weight, int64_t groups) {
  check_weight(weight);
  const int64_t filters = weight.size(0), channels = weight.size(1);
  const int64_t height = weight.size(2), width = weight.size(3), taps = height * width;
  STD_TORCH_CHECK(groups > 0 && filters % groups == 0,
                  "groups: expected a positive divisor of the filters");
  const Tensor dense = as_format(weight, MemoryFormat::Contiguous);
  const int64_t size = int8_packed_size(filters, channels, height, width, groups);
  const Tensor packed = empty_packed(size, ScalarType::Char, weight);
  const auto* const from = data_of<int8_t>(dense);
  auto* const to = mutable_data_of<int8_t>(packed);
  if (is_int8_narrow(filters, channels, groups)) {
    pack_int8_narrow(from, filters, channels, height, width, to);
  } else if (has_int8_vnni()) {
    pack_int8_vnni(from, filters, channels, taps, groups, to);
  } else {
    run_on_isa([&](auto isa) {
      pack_direct<DirectPlain<decltype(isa)::value>>(from, filters, channels, taps, groups, to);
    });
  }
  return packed;
}

void check_bytes(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Byte && t.dim() == 4, name,
                  ": expected a CPU tensor of uint8 with 4 dimensions");
}

Tensor int8_conv(const Tensor& x, const Tensor& packed, const Tensor& weight, const Tensor& scale,
                 const Tensor& shift, const OptTensor& residual, IntList stride, IntList padding,
                 IntList dilation, int64_t groups, const std::string& act_name, int64_t zero,
                 double residual_scale, double inverse, int64_t out_zero) {
  const Act act = parse_act(act_name);
  check_bytes("x", x);
  check_weight(weight);
  const Geometry g = geometry_of(x, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(g.depth() <= kInt8Depth, "weight: expected at most ", kInt8Depth,
                  " values a filter");
  STD_TORCH_CHECK(zero >= 0 && zero <= 255 && out_zero >= 0 && out_zero <= 255,
                  "zero, out_zero: expected 0 to 255");
  STD_TORCH_CHECK(inverse > 0, "inverse: expected a positive factor");
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Char &&
                      packed.is_contiguous() && packed.numel() == int8_packed_size(g),
                  "packed: expected what _int8_weight returns for this weight");
  for (const auto& [name, vector] : {std::pair{"scale", &scale}, {"shift", &shift}}) {
    STD_TORCH_CHECK(vector->is_cpu() && vector->scalar_type() == ScalarType::Float &&
                        vector->dim() == 1 && vector->size(0) == g.filters &&
                        vector->is_contiguous(),
                    name, ": expected a dense CPU vector of float32, one value a filter");
  }
  const Tensor y = empty_channels_last({g.batch, g.filters, g.out[1], g.out[2]}, x);
  if (residual) {
    check_bytes("residual", *residual);
    STD_TORCH_CHECK(same_shape(*residual, y), "residual: expected the output's shape");
  }
  if (y.numel() == 0) return y;
  const Tensor dense = channels_last_memory(x);
  const Tensor added = residual ? channels_last_memory(*residual) : Tensor();
  DirectOperands<uint8_t> o{data_of<uint8_t>(dense),
                            packed.const_data_ptr(),
                            data_of<float>(scale),
                            data_of<float>(shift),
                            residual ? data_of<uint8_t>(added) : nullptr,
                            mutable_data_of<uint8_t>(y),
                            act};
  o.grid = {static_cast<uint8_t>(zero), static_cast<float>(residual_scale),
            static_cast<float>(inverse), static_cast<float>(out_zero)};
  run_int8(g, o);
  return y;
}

// x on a grid: round(x * inverse) + zero, what lies beyond it at its ends, NaN at its lower one.
RF_INLINE inline void put_on_grid(const float* __restrict x, int64_t count, float inverse,
                                  float zero, uint8_t* __restrict y) {
  constexpr float kRound = 12582912.0f;  // direct.h
  for (int64_t i = 0; i < count; ++i) {
    float v = x[i] * inverse + zero;
    v = v > 0.0f ? v : 0.0f;
    v = v > 255.0f ? 255.0f : v;
    y[i] = static_cast<uint8_t>(std::bit_cast<uint32_t>(v + kRound));
  }
}

// A line of kChannels planes, which are `plane` apart, to pixels that are `step` apart.
template <int kChannels>
RF_INLINE inline void interleave(const float* x, int64_t plane, int64_t width, float inverse,
                                 float zero, uint8_t* to, int64_t step = kChannels) {
  constexpr int64_t kColumns = 256;  // whose bytes stay in the first-level cache
  uint8_t values[kChannels][kColumns];
  for (int64_t w0 = 0; w0 < width; w0 += kColumns) {
    const int64_t columns = std::min(kColumns, width - w0);
    for (int c = 0; c < kChannels; ++c) {
      put_on_grid(x + c * plane + w0, columns, inverse, zero, values[c]);
    }
    uint8_t* __restrict out = to + w0 * step;
    if (step == kChannels) {
      for (int64_t w = 0; w < columns; ++w) {
        for (int c = 0; c < kChannels; ++c) out[w * kChannels + c] = values[c][w];
      }
    } else {
      for (int64_t w = 0; w < columns; ++w) out[w * step] = values[0][w];
    }
  }
}

Tensor int8_quantize(const Tensor& x, double inverse, int64_t zero) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float && x.dim() == 4,
                  "x: expected a CPU tensor of float32 with 4 dimensions");
  STD_TORCH_CHECK(inverse > 0 && zero >= 0 && zero <= 255,
                  "inverse, zero: expected a positive factor and 0 to 255");
  const Tensor like = empty({0}, ScalarType::Byte, x);
  const Tensor y = empty_channels_last(shape_of(x), like);
  if (y.numel() == 0) return y;
  const bool planar = x.is_contiguous() && !is_channels_last(x);
  const Tensor dense = planar ? x : channels_last_memory(x);
  const int64_t channels = x.size(1), width = x.size(3), line = width * channels;
  const int64_t plane = x.size(2) * width;
  const float* const from = data_of<float>(dense);
  auto* const to = mutable_data_of<uint8_t>(y);
  const auto factor = static_cast<float>(inverse), offset = static_cast<float>(zero);
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(
        x.size(0) * x.size(2), [&](int64_t begin, int64_t end) RF_INLINE {
          for (int64_t at = begin; at < end; ++at) {
            uint8_t* __restrict out = to + at * line;
            if (!planar) {
              put_on_grid(from + at * line, line, factor, offset, out);
              continue;
            }
            const int64_t n = at / x.size(2), h = at % x.size(2);
            const float* in = from + n * channels * plane + h * width;
            if (channels == 3) {
              interleave<3>(in, plane, width, factor, offset, out);
              continue;
            }
            for (int64_t c = 0; c < channels; ++c) {
              interleave<1>(in + c * plane, plane, width, factor, offset, out + c, channels);
            }
          }
        });
  });
  return y;
}

// What bytes on a grid stand for, channels-last.
Tensor int8_dequantize(const Tensor& x, double scale, int64_t zero) {
  check_bytes("x", x);
  STD_TORCH_CHECK(zero >= 0 && zero <= 255, "zero: expected 0 to 255");
  const Tensor dense = channels_last_memory(x);
  const Tensor like = empty({0}, ScalarType::Float, x);
  const Tensor y = empty_channels_last(shape_of(x), like);
  const auto* const from = data_of<uint8_t>(dense);
  auto* const to = mutable_data_of<float>(y);
  const auto factor = static_cast<float>(scale), offset = static_cast<float>(zero);
  constexpr int64_t kPiece = 1 << 14;  // values a task takes
  const int64_t count = x.numel();
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>((count + kPiece - 1) / kPiece,
                                      [&](int64_t begin, int64_t end) RF_INLINE {
                                        const int64_t last = std::min(count, end * kPiece);
                                        for (int64_t i = begin * kPiece; i < last; ++i) {
                                          to[i] = (float(from[i]) - offset) * factor;
                                        }
                                      });
  });
  return y;
}

}  // namespace

int64_t int8_packed_size(int64_t filters, int64_t channels, int64_t height, int64_t width,
                         int64_t groups) {
  if (is_int8_narrow(filters, channels, groups)) {
    return int8_narrow_packed_size(filters, channels, height, width);
  }
  const int64_t taps = height * width;
  if (has_int8_vnni()) return int8_vnni_packed_size(filters, channels, taps, groups);
  int64_t size = 0;
  run_on_isa([&](auto isa) {
    size = direct_packed_size<DirectPlain<decltype(isa)::value>>(filters, channels, taps, groups);
  });
  return size;
}

void run_int8(const Geometry& g, const DirectOperands<uint8_t>& o) {
  if (is_int8_narrow(g.filters, g.group_channels(), g.groups)) return int8_narrow(g, o);
  if (has_int8_vnni()) return int8_vnni(g, o);
  run_on_isa([&](auto isa) {
    constexpr Isa kIsa = decltype(isa)::value;
    if (reads_bands(g)) {
      return parallel_on<kIsa>(band_tasks<DirectPlain<kIsa>>(g),
                               [&](int64_t begin, int64_t end) RF_INLINE {
                                 direct_bands<DirectPlain<kIsa>>(g, o, begin, end);
                               });
    }
    const DirectCut cut(g, DirectPlain<kIsa>::kBlock, worker_count());
    parallel_on<kIsa>(g.groups * cut.chunks * cut.strips,
                      [&](int64_t begin, int64_t end)
                          RF_INLINE { direct_tasks<DirectPlain<kIsa>>(g, o, cut, begin, end); });
  });
}

void run_int8_linear(const LinearOperands& o) {
  if (has_int8_vnni()) return int8_linear_vnni(o);
  run_on_isa([&](auto isa) {
    using K = DirectPlain<decltype(isa)::value>;
    const int64_t blocks = (o.filters + K::kBlock - 1) / K::kBlock;
    parallel_on<decltype(isa)::value>(
        blocks, [&](int64_t begin, int64_t end) RF_INLINE { linear_tasks<K>(o, begin, end); });
  });
}

}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_int8_weight", TORCH_BOX(&resnet_fast::cpu::int8_weight));
  m.impl("_int8_conv", TORCH_BOX(&resnet_fast::cpu::int8_conv));
  m.impl("_int8_quantize", TORCH_BOX(&resnet_fast::cpu::int8_quantize));
  m.impl("_int8_dequantize", TORCH_BOX(&resnet_fast::cpu::int8_dequantize));
}
