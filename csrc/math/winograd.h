// Winograd's minimal filtering F(m x m, 3 x 3) in one dimension: y = Aᵀ[(G g) ⊙ (Bᵀ d)]
// (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308). Applied along rows, then along columns.
//
// m = 2 interpolates at 0, 1, -1, ∞. m = 4 takes 0, ±2/3, ±3/2, ∞ rather than the usual 0, ±1, ±2,
// ∞: reciprocal pairs keep the entries of all three matrices close to 1, which halves the error
// (points near 1 are from Barabasz et al. 2020, arXiv:1803.10986).
#pragma once

#include "activation.h"

namespace resnet_fast {

template <int M>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kTile = 4;
  static constexpr double kG[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

  template <typename V>
  RESNET_FAST_HD static void input(const V (&d)[4], V (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[2] + d[1];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }

  template <typename V>
  RESNET_FAST_HD static void output(const V (&p)[4], V (&y)[2]) {
    y[0] = p[0] + (p[1] + p[2]);
    y[1] = (p[1] - p[2]) + p[3];
  }
};

template <>
struct Winograd<4> {
  static constexpr int kTile = 6;
  static constexpr float kA = 2.0f / 3, kB = 3.0f / 2;  // kA * kB == 1
  static constexpr float kA2 = 4.0f / 9, kB2 = 9.0f / 4;
  // Row of the point p: (1, p, p²) / Π (p - q) over the other finite points q.
  static constexpr double kAA = 4.0 / 9, kBB = 9.0 / 4;
  static constexpr double kNA = 1 / (2 * kAA * (kAA - kBB)), kNB = 1 / (2 * kBB * (kBB - kAA));
  static constexpr double kG[6][3] = {{1, 0, 0},
                                      {kNA, kNA * 2 / 3, kNA * 4 / 9},
                                      {kNA, -kNA * 2 / 3, kNA * 4 / 9},
                                      {kNB, kNB * 3 / 2, kNB * 9 / 4},
                                      {kNB, -kNB * 3 / 2, kNB * 9 / 4},
                                      {0, 0, 1}};

  // Rows of Bᵀ are the coefficients of Π (z - q) over the other finite points.
  template <typename V>
  RESNET_FAST_HD static void input(const V (&d)[6], V (&t)[6]) {
    const V even_a = d[4] - kB2 * d[2], odd_a = kA * d[3] - kB * d[1];
    const V even_b = d[4] - kA2 * d[2], odd_b = kB * d[3] - kA * d[1];
    t[0] = (d[0] + d[4]) - (kA2 + kB2) * d[2];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = (d[1] + d[5]) - (kA2 + kB2) * d[3];
  }

  // Row k of Aᵀ holds the points' k-th powers; the point ∞ enters the last.
  template <typename V>
  RESNET_FAST_HD static void output(const V (&p)[6], V (&y)[4]) {
    const V sum_a = p[1] + p[2], sum_b = p[3] + p[4];
    const V odd_a = kA * (p[1] - p[2]), odd_b = kB * (p[3] - p[4]);
    y[0] = p[0] + (sum_a + sum_b);
    y[1] = odd_a + odd_b;
    y[2] = kA2 * sum_a + kB2 * sum_b;
    y[3] = p[5] + (kA2 * odd_a + kB2 * odd_b);
  }
};

}  // namespace resnet_fast
