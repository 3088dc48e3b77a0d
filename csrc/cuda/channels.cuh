// Reductions over the values of each channel and passes along them, for both memory layouts: who
// reads what. What is computed is the argument's affair (bn_act_train.cuh).
//
// Every access is one aligned vector of LANES elements: the launcher takes LANES = 1 where the
// element count is no multiple of the vector, or a plane is shorter than one, so that no kernel
// here has a tail, and none more than two channels in a vector of channels-first memory.
#pragma once

#include "bn_act.cuh"
#include "ptx.cuh"

namespace resnet_fast {

// PARAMETERS numbers for each of K channels.
template <typename C, int PARAMETERS, int K>
struct Channels {
  C value[PARAMETERS][K];
};

// to[j] = from[(channel + j) % channels], `missing` where there is no `from`. `vector` says that
// the K channels are adjacent and aligned to 16 bytes.
template <int K, typename C, typename Index>
__device__ inline void load_channels(C (&to)[K], const C* __restrict__ from, C missing,
                                     Index channel, Index channels, bool vector) {
  constexpr int kPart = K < kLanes<C> ? K : kLanes<C>;
  if (vector && from) {
#pragma unroll
    for (int part = 0; part < K; part += kPart) {
      const auto loaded = load_vector<kPart>(from + channel + part);
#pragma unroll
      for (int j = 0; j < kPart; ++j) to[part + j] = loaded.lane[j];
    }
  } else {
#pragma unroll
    for (int j = 0; j < K; ++j) {
      to[j] = from ? from[channel] : missing;
      if (++channel == channels) channel = 0;
    }
  }
}

// What a thread has gathered of K channels, from `count` values of each: SUMS numbers.
template <typename C, int SUMS, int K, typename Index>
struct Gathered {
  C sum[SUMS][K];
  Index count;
};

// What a block has gathered of one channel. A count beyond 2^24 is rounded in fp32, by as little as
// a sum of so many values.
template <typename C>
struct alignas(16) Partial {
  C sum[3];
  C count;

  template <int SUMS, int K, typename Index>
  __device__ static Partial of(const Gathered<C, SUMS, K, Index>& gathered, int k) {
    Partial partial{};
#pragma unroll
    for (int i = 0; i < SUMS; ++i) partial.sum[i] = gathered.sum[i][k];
    partial.count = static_cast<C>(gathered.count);
    return partial;
  }
};

// Joins what the `rows` threads of a column have gathered, in a fixed order; the result is that of
// row 0. Threads are numbered row by row; `rows` is a power of two. All threads of the block call.
//
//   row   0  1  2  3  4  5  6  7
//         |  |  |  |  |  |  |  |
//         0<----------4  |  |  |       half = 4: the upper half leaves its own in shared memory,
//         |  1<----------5  |  |       the lower half takes it
//         0<----2  ...
//
// A round writes where the round before was not read, so one barrier a round is enough.
template <typename Reduce, typename C, int SUMS, int K, typename Index>
__device__ inline void combine_rows(Gathered<C, SUMS, K, Index>& own, unsigned row, unsigned rows) {
  const unsigned threads = blockDim.x, thread = threadIdx.x, tile = threads / rows;
  C* const sums = reinterpret_cast<C*>(shared_memory());
  Index* const count = reinterpret_cast<Index*>(sums + SUMS * K * threads);
  for (unsigned half = rows / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half) {
#pragma unroll
      for (int i = 0; i < SUMS * K; ++i) sums[i * threads + thread] = own.sum[i / K][i % K];
      count[thread] = own.count;
    }
    sync_block();
    if (row < half) {
      const unsigned from = thread + half * tile;
      Gathered<C, SUMS, K, Index> other;
#pragma unroll
      for (int i = 0; i < SUMS * K; ++i) other.sum[i / K][i % K] = sums[i * threads + from];
      other.count = count[from];
      Reduce::combine(own, other);
    }
  }
}

// Blocks a multiprocessor is to hold, which bounds the registers; 64-bit indices need more of them.
template <typename Index, int BLOCKS>
inline constexpr int kLeastBlocks = sizeof(Index) == 4 ? BLOCKS : 2;

// Channels-last: memory is a matrix of vectors, and a column's LANES channels are the same in each
// row (ColumnGrid). Block (tile, split) takes `tile` adjacent columns, its thread (row, column)
// every gridDim.y * rows-th row of one, kUnroll at a time (C = 24, fp16: 3 columns; tile 3, rows 2,
// splits 2):
//
//   channel    0      8      16
//   row 0    |t0    |t1    |t2    |  split 0        t3 joins t0, t4 joins t1, ...; the block
//   row 1    |t3    |t4    |t5    |                 writes a partial a column and lane, adjacent
//   row 2    |t0    |t1    |t2    |  split 1        in memory
//   row 3    |t3    |t4    |t5    |
//   row 4    |t0    |t1    |t2    |  split 0
//
// A warp reads 512 adjacent bytes: of one row where there are 32 columns, else of several.
template <typename T, int LANES, typename Index, typename Reduce>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Index, Reduce::kRowBlocks>)
    channels_last_sums_kernel(Reduce reduce, Partial<Accumulator<T>>* __restrict__ partials,
                              Index vectors, Index columns, Index channels, bool vector_parameters,
                              unsigned rows) {
  using C = Accumulator<T>;
  constexpr int kUnroll = Reduce::template kRowsAtOnce<LANES>;
  const unsigned tile = blockDim.x / rows;
  const unsigned row = threadIdx.x / tile;
  const Index column = static_cast<Index>(blockIdx.x) * tile + threadIdx.x % tile;
  Gathered<C, Reduce::kSums, LANES, Index> own{};
  if (column < columns) {
    const auto parameters = reduce.template channels<LANES>(
        static_cast<Index>(column * LANES % channels), channels, vector_parameters);
    const Index depth = (vectors - column - 1) / columns + 1;
    const Index step = static_cast<Index>(gridDim.y) * rows;
    for (Index at = static_cast<Index>(blockIdx.y) * rows + row; at < depth; at += kUnroll * step) {
      typename Reduce::template Loaded<LANES> in[kUnroll];
      int filled = 0;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const Index line = at + static_cast<Index>(u) * step;
        if (line < depth) {
          in[u] = reduce.template load<LANES>(line * columns + column);
          filled = u + 1;
        }
      }
      reduce.add_rows(own, parameters, in, filled);
    }
  }
  Reduce::close(own);
  combine_rows<Reduce>(own, row, rows);
  if (row == 0 && column < columns) {
    const size_t line = static_cast<size_t>(columns) * LANES * blockIdx.y;
#pragma unroll
    for (int j = 0; j < LANES; ++j) {
      partials[line + column * LANES + j] = Partial<C>::of(own, j);
    }
  }
}

// Channels-first: a channel's values are a plane an image, and a block belongs to one channel. The
// planes' vectors, `plane_vectors` for each image, are a line of which the threads of the channel's
// splits take turns (7x7 planes, fp16: 7 vectors a plane, which starts anywhere in the first):
//
//   element    0        8        16  ...    40       48       56
//   plane      |0                               :|1:49                        :|2:98
//   channel 0  |v0      |v1      |v2  ...   |v5      |v6      |
//   channel 1                                        |v0      |v1 ...         |v6      |
//
// A vector that two planes share is read for both, each taking its own lanes: 1 in 7 here, from
// cache, as adjacent channels are adjacent blocks. Reading each plane from its own start would
// cost 16-byte loads altogether.
template <typename T, int LANES, typename Index, typename Reduce>
__global__ void __launch_bounds__(kThreads, kLeastBlocks<Index, Reduce::kPlaneBlocks>)
    planes_sums_kernel(Reduce reduce, Partial<Accumulator<T>>* __restrict__ partials, Index batch,
                       Index channels, Index plane, Index plane_vectors) {
  using C = Accumulator<T>;
  constexpr int kUnroll = Reduce::template kVectorsAtOnce<LANES>;
  const Index channel = blockIdx.x % channels;
  const unsigned split = static_cast<unsigned>(blockIdx.x / channels);
  const Index step = gridDim.x / channels * blockDim.x;
  const Index image_step = step / plane_vectors, vector_step = step % plane_vectors;
  const auto parameters = reduce.template channels<1>(channel, channels, false);
  Gathered<C, Reduce::kSums, 1, Index> own{};

  Index vector = static_cast<Index>(split) * blockDim.x + threadIdx.x;
  Index image = vector / plane_vectors;
  vector -= image * plane_vectors;
  while (image < batch) {
    typename Reduce::template Loaded<LANES> in[kUnroll];
    // Of each vector, lanes [begin, end) are the channel's.
    int begin[kUnroll], end[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      begin[u] = end[u] = 0;
      if (image < batch) {
        const Index start = (image * channels + channel) * plane;
        const Index first = (start / LANES + vector) * LANES;
        if (first < start + plane) {
          in[u] = reduce.template load<LANES>(first / LANES);
          const Index left = start + plane - first;
          begin[u] = first < start ? static_cast<int>(start - first) : 0;
          end[u] = left < static_cast<Index>(LANES) ? static_cast<int>(left) : LANES;
        }
      }
      image += image_step;
      vector += vector_step;
      if (vector >= plane_vectors) {
        vector -= plane_vectors;
        ++image;
      }
    }
    reduce.add_lanes(own, parameters, in, begin, end);
  }
  Reduce::close(own);
  combine_rows<Reduce>(own, threadIdx.x, blockDim.x);
  if (threadIdx.x == 0) {
    partials[static_cast<size_t>(split) * channels + channel] = Partial<C>::of(own, 0);
  }
}

// How the rows of finish_kernel join.
struct AddPartials {
  template <typename Sums>
  __device__ static void combine(Sums& own, const Sums& other) {
    own.sum[0][0] += other.sum[0][0];
    own.sum[1][0] += other.sum[1][0];
  }
};

// A channel's partials, in fp64: they are few, and the order of a sum of so many values shows in
// fp32. 32 channels a block, so that a warp reads adjacent partials; thread (row, channel) takes
// every rows-th.
template <typename C, typename Finish>
__global__ void __launch_bounds__(1024)
    finish_kernel(Finish finish, const Partial<C>* __restrict__ partials, unsigned count,
                  unsigned channels) {
  const unsigned row = threadIdx.x / kWarp, rows = blockDim.x / kWarp;
  const unsigned channel = blockIdx.x * kWarp + threadIdx.x % kWarp;
  Gathered<double, 2, 1, unsigned> own{};
  Partial<C> first{};
  if (channel < channels) {
    first = partials[channel];
#pragma unroll 4
    for (unsigned p = row; p < count; p += rows) {
      Finish::add(own, partials[static_cast<size_t>(p) * channels + channel], first);
    }
  }
  combine_rows<Finish>(own, row, rows);
  if (row == 0 && channel < channels) finish.store(channel, own, first);
}

// A pass over channels-last memory. As in bn_act_channels_last_kernel a thread meets the same LANES
// channels at each step, and keeps what it knows of them in registers.
template <typename T, int LANES, typename Index, typename Map>
__global__ void __launch_bounds__(kThreads, Map::kBlocks)
    channels_last_map_kernel(Map map, Index vectors, Index channels, bool vector_parameters) {
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  if (first >= vectors) return;
  const auto parameters = map.template channels<LANES>(static_cast<Index>(first * LANES % channels),
                                                       channels, vector_parameters);
  for (Index vector = first; vector < vectors; vector += step) {
    map.template apply<LANES>(vector, parameters);
  }
}

// A pass over channels-first memory. As in bn_act_planes_kernel a vector may end one plane and
// begin the next; a position is divided out once and then advanced with a carry.
template <typename T, int LANES, typename Index, typename Map>
__global__ void __launch_bounds__(kThreads, Map::kBlocks)
    planes_map_kernel(Map map, Index vectors, Index channels, Index plane,
                      PlaneStep<Index> advance) {
  using C = Accumulator<T>;
  const Index first = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  Index offset = first * LANES;
  Index channel = offset / plane;
  offset -= channel * plane;
  channel %= channels;
  for (Index vector = first; vector < vectors; vector += step) {
    const auto own = map.template channels<1>(channel, channels, false);
    auto next = own;
    const Index left = plane - offset;
    if (left < static_cast<Index>(LANES)) {
      next = map.template channels<1>(channel + 1 == channels ? 0 : channel + 1, channels, false);
    }
    Channels<C, Map::kParameters, LANES> parameters;
#pragma unroll
    for (int p = 0; p < Map::kParameters; ++p) {
#pragma unroll
      for (int j = 0; j < LANES; ++j) {
        parameters.value[p][j] = static_cast<Index>(j) < left ? own.value[p][0] : next.value[p][0];
      }
    }
    map.template apply<LANES>(vector, parameters);

    offset += advance.offset;
    channel += advance.channel;
    if (offset >= plane) {
      offset -= plane;
      ++channel;
    }
    if (channel >= channels) channel -= channels;
  }
}

}  // namespace resnet_fast
