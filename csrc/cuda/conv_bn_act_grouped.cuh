// Device code of conv_bn_act for depthwise and narrowly grouped convolutions.
#pragma once

#include "conv_bn_act.cuh"

namespace resnet_fast {

// Channels and pixels of a block's tile; a thread owns kLanes channels of kGroupedRun adjacent
// pixels of one row of y.
inline constexpr int kGroupedChannels = 32;
inline constexpr int kGroupedRun = 4;

template <typename T>
inline constexpr int kGroupedRows = kThreads / (kGroupedChannels / kLanes<T>);

// Bytes of shared memory for `taps` taps: the block's weights, fp32.
constexpr int64_t grouped_shared_bytes(int64_t taps, int group) {
  return taps * group * kGroupedChannels * static_cast<int64_t>(sizeof(float));
}

//   y[m, k] = act(sum_{tap, c < GROUP} x[m under tap, g + c] * weight[k, tap, c] * scale[k] + ...)
//
// with g = k - k % GROUP: as many filters a group as channels, 1 (depthwise), 2, 4 or 8. A matrix
// product over so few channels would leave most of a tensor core's tile empty, and the layer is
// bound by memory: ResNeXt-50's first stage does 14 million fp32 products an image (0.4 us of an
// H100's cores) where its bytes take 0.5 us. So the cores multiply, in fp32 of any storage dtype.
//
//           32 channels: 4 vectors of 8 (fp16)
//         +----+----+----+----+
//   row 0 | t0 | t1 | t2 | t3 |   each thread: 4 adjacent columns of y, one row, 16 bytes of
//   row 1 | t4 | ...          |   channels; rows of threads take runs of 4 pixels in turn
//         +----+----+----+----+
//
// The weights lie in shared memory as [tap][c][32], so that a thread reads kLanes filters' weights
// of one input channel at once and uses them for its 4 pixels. Channels must be a multiple of
// kLanes, and x, y and residual 16-byte aligned.
template <typename T, int GROUP>
__global__ void __launch_bounds__(kThreads)
    conv_grouped_kernel(ConvShape s, const T* __restrict__ x, const T* __restrict__ weight,
                        ConvEpilogue<T> epilogue) {
  constexpr int kWidth = kLanes<T>;
  static_assert(GROUP <= kWidth && kWidth % GROUP == 0);
  constexpr int kVectors = kGroupedChannels / kWidth;
  auto* const weights = reinterpret_cast<float*>(shared_memory());
  const int first_channel = static_cast<int>(blockIdx.y) * kGroupedChannels;
  const int taps = s.kernel_h * s.kernel_w;

  for (int i = static_cast<int>(threadIdx.x); i < taps * GROUP * kGroupedChannels; i += kThreads) {
    const int filter = i % kGroupedChannels, at = i / kGroupedChannels;  // at = tap * GROUP + c
    const int k = first_channel + filter;
    weights[i] = k < s.channels ? to_accumulator(weight[int64_t{k} * taps * GROUP + at]) : 0.0f;
  }
  sync_block();

  const int lane0 = static_cast<int>(threadIdx.x) % kVectors * kWidth;
  const int channel = first_channel + lane0;
  const int runs = (s.out_width + kGroupedRun - 1) / kGroupedRun;
  const int64_t run =
      int64_t{blockIdx.x} * kGroupedRows<T> + static_cast<int>(threadIdx.x) / kVectors;
  if (channel >= s.channels || run >= int64_t{s.batch} * s.out_height * runs) return;
  const int column = static_cast<int>(run % runs) * kGroupedRun;
  const int row = static_cast<int>(run / runs % s.out_height);
  const int image = static_cast<int>(run / runs / s.out_height);

  float sum[kGroupedRun][kWidth] = {};
  for (int r = 0; r < s.kernel_h; ++r) {
    const int h = row * s.stride_h - s.pad_h + r * s.dilation_h;
    if (static_cast<unsigned>(h) >= static_cast<unsigned>(s.height)) continue;
    const T* const line = x + (int64_t{image} * s.height + h) * s.width * s.channels + channel;
    for (int c = 0; c < s.kernel_w; ++c) {
      float value[kGroupedRun][kWidth];
#pragma unroll
      for (int p = 0; p < kGroupedRun; ++p) {
        const int w = (column + p) * s.stride_w - s.pad_w + c * s.dilation_w;
        const bool inside = static_cast<unsigned>(w) < static_cast<unsigned>(s.width);
        Vector<T, kWidth> in{};
        if (inside && column + p < s.out_width)
          in = load_vector<kWidth>(line + int64_t{w} * s.channels);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) value[p][e] = to_accumulator(in.lane[e]);
      }
      const float* const tap = weights + (r * s.kernel_w + c) * GROUP * kGroupedChannels + lane0;
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        float factor[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; e += 4) {
          const auto four = load_vector<4>(tap + g * kGroupedChannels + e);
#pragma unroll
          for (int f = 0; f < 4; ++f) factor[e + f] = four.lane[f];
        }
#pragma unroll
        for (int p = 0; p < kGroupedRun; ++p)
#pragma unroll
          for (int e = 0; e < kWidth; ++e)
            sum[p][e] = fmaf(value[p][e / GROUP * GROUP + g], factor[e], sum[p][e]);
      }
    }
  }

  float scale[kWidth], shift[kWidth];
  conv::load_affine(epilogue.scale, epilogue.shift, channel, kWidth, scale, shift);
#pragma unroll
  for (int p = 0; p < kGroupedRun; ++p) {
    if (column + p >= s.out_width) continue;
    const int64_t pixel = (int64_t{image} * s.out_height + row) * s.out_width + column + p;
    conv::finish(epilogue, sum[p], scale, shift, pixel * s.channels + channel, kWidth);
  }
}

}  // namespace resnet_fast
