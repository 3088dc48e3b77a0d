// The end of a network on 8 bits: the mean over an image, and the linear layer, both of bytes and
// both giving fp32, since what comes after them is the caller's.
#include "int8_linear.h"
#include "pool.h"

namespace resnet_fast::cpu {
namespace {

// The mean over each image of the real values, [N][C][1][1]. Sums are exact: an image of 2^23
// pixels fits 32 bits.
Tensor int8_mean(const Tensor& x, double scale, int64_t zero) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Byte && x.dim() == 4,
                  "x: expected a CPU tensor of uint8 with 4 dimensions");
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(pixels > 0 && pixels < (int64_t(1) << 23), "x: expected 1 to 2^23 pixels");
  const Tensor dense = as_format(x, MemoryFormat::ChannelsLast);
  const Tensor y = empty({batch, channels, 1, 1}, ScalarType::Float, x);
  if (y.numel() == 0) return y;
  const auto* const from = data_of<uint8_t>(dense);
  auto* const to = mutable_data_of<float>(y);
  constexpr int64_t kPiece = 64;  // channels a task takes
  const int64_t pieces = (channels + kPiece - 1) / kPiece;
  run_on_isa([&](auto isa) {
    parallel_on<decltype(isa)::value>(batch * pieces, [&](int64_t begin, int64_t end) RF_INLINE {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / pieces, c0 = task % pieces * kPiece;
        const int64_t count = std::min(kPiece, channels - c0);
        const uint8_t* __restrict at = from + n * pixels * channels + c0;
        int32_t sums[kPiece] = {};
        for (int64_t p = 0; p < pixels; ++p, at += channels) {
          if (count == kPiece) {
            for (int64_t c = 0; c < kPiece; ++c) sums[c] += at[c];
          } else {
            for (int64_t c = 0; c < count; ++c) sums[c] += at[c];
          }
        }
        for (int64_t c = 0; c < count; ++c) {
          const double mean = double(sums[c]) / double(pixels) - double(zero);
          to[n * channels + c0 + c] = static_cast<float>(mean * scale);
        }
      }
    });
  });
  return y;
}

// y[n][k] = scale[k] * (sum of x[n] w[k]) + shift[k], packed as a 1x1 convolution's weight.
Tensor int8_linear(const Tensor& x, const Tensor& packed, const Tensor& weight, const Tensor& scale,
                   const Tensor& shift) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Byte && x.dim() == 2,
                  "x: expected a CPU tensor of uint8 with 2 dimensions");
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Char &&
                      weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 &&
                      weight.size(3) == 1,
                  "weight: expected int8 of shape [K, C, 1, 1]");
  LinearOperands o{};
  o.rows = x.size(0);
  o.depth = x.size(1);
  o.filters = weight.size(0);
  STD_TORCH_CHECK(o.depth > 0 && o.depth % 4 == 0 && o.depth <= kInt8Depth,
                  "x: expected a multiple of 4 channels, at most ", kInt8Depth);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Char &&
                      packed.is_contiguous() &&
                      packed.numel() == int8_packed_size(o.filters, o.depth, 1, 1, 1),
                  "packed: expected what _int8_weight returns for this weight");
  for (const auto& [name, vector] : {std::pair{"scale", &scale}, {"shift", &shift}}) {
    STD_TORCH_CHECK(vector->is_cpu() && vector->scalar_type() == ScalarType::Float &&
                        vector->numel() == o.filters && vector->is_contiguous(),
                    name, ": expected a dense CPU vector of float32, one value a filter");
  }
  const Tensor dense = as_format(x, MemoryFormat::Contiguous);
  const Tensor y = empty({o.rows, o.filters}, ScalarType::Float, x);
  if (y.numel() == 0) return y;
  o.x = data_of<uint8_t>(dense);
  o.packed = data_of<int8_t>(packed);
  o.scale = data_of<float>(scale);
  o.shift = data_of<float>(shift);
  o.y = mutable_data_of<float>(y);
  run_int8_linear(o);
  return y;
}

}  // namespace
}  // namespace resnet_fast::cpu

STABLE_TORCH_LIBRARY_IMPL(resnet_fast, CPU, m) {
  m.impl("_int8_mean", TORCH_BOX(&resnet_fast::cpu::int8_mean));
  m.impl("_int8_linear", TORCH_BOX(&resnet_fast::cpu::int8_linear));
}
