// The product of a few rows with a panel of columns: the inner loop of matrix products and of attention.
//
// Everything is counted in units of 32 bits, which hold consecutive values along the summed dimension: one float, two
// bfloat16 or four bytes. A unit of a row is broadcast and multiplied by the same unit of one column per lane, so nothing is
// summed across lanes. Every element of the result is summed in order of its units, in one accumulator: a row's result does
// not depend on which rows are computed together.
#pragma once

#include "simd.h"

struct Float32 {
  using Value = float;
  static constexpr int kDepth = 1;  // values in a unit
  static F32 dot(F32 sum, U32 column, U32 row) { return fma((F32)row, (F32)column, sum); }
};

struct BFloat16 {
  using Value = bf16;
  static constexpr int kDepth = 2;
  static F32 dot(F32 sum, U32 column, U32 row) {
#if defined(LLAMA_RAY_AVX512) && defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)column, (__m512bh)row);
#else
    const U32 high = broadcast(0xffff0000u);
    sum = fma((F32)(row & high), (F32)(column & high), sum);
    return fma((F32)(row << 16), (F32)(column << 16), sum);
#endif
  }
};

// Unsigned bytes of the column times signed bytes of the row.
inline I32 dot_bytes(I32 sum, U32 column, U32 row) {
#if defined(LLAMA_RAY_AVX512) && defined(__AVX512VNNI__)
  return (I32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)column, (__m512i)row);
#else
  const U32 low = broadcast(0x00ff00ffu);
  const U32 even = column & low, odd = (column >> 8) & low;
#if defined(LLAMA_RAY_AVX2)
  const __m256i row_even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)row, 8), 8);
  const __m256i row_odd = _mm256_srai_epi16((__m256i)row, 8);
  sum += (I32)_mm256_madd_epi16((__m256i)even, row_even);
  return sum + (I32)_mm256_madd_epi16((__m256i)odd, row_odd);
#else
  sum += (I32)(even & 0xffu) * ((I32)(row << 24) >> 24);
  sum += (I32)(odd & 0xffu) * ((I32)(row << 16) >> 24);
  sum += (I32)(even >> 16) * ((I32)(row << 8) >> 24);
  return sum + (I32)(odd >> 16) * ((I32)row >> 24);
#endif
#endif
}

// The largest tile, in rows and vectors of columns, whose sums fit into registers next to a vector of columns and a
// broadcast.
constexpr int kMostRows = 6;
constexpr int kMostVectors = kManyRegisters ? 4 : 2;

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Call `body` with `rows` (1 to kMostRows) as a constant.
template <class Body>
inline void with_rows(int rows, const Body& body) {
  static_assert(kMostRows == 6);
  switch (rows) {
    case 1: return body(Constant<1>());
    case 2: return body(Constant<2>());
    case 3: return body(Constant<3>());
    case 4: return body(Constant<4>());
    case 5: return body(Constant<5>());
    default: return body(Constant<6>());
  }
}

// sums[r][c] (+)= rows[r] . columns c, for ROWS rows and VECTORS vectors of columns. `stride` is the number of columns
// in a panel, `width` the number of floats from one row of sums to the next.
template <class Dot, bool ADD, int ROWS, int VECTORS>
inline void product_tile(const uint32_t* const* rows, const uint32_t* columns, int64_t stride, int64_t units,
                         float* sums, int64_t width) {
  const uint32_t* row[ROWS];
  F32 sum[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r) {
    row[r] = rows[r];
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = ADD ? load<F32>(sums + r * width + v * kLanes) : F32{};
  }
  for (int64_t u = 0; u < units; ++u, columns += stride) {
    U32 column[VECTORS];
    for (int v = 0; v < VECTORS; ++v) column[v] = load<U32>(columns + v * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const U32 x = broadcast(row[r][u]);
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Dot::dot(sum[r][v], column[v], x);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(sums + r * width + v * kLanes, sum[r][v]);
}

// The same for a whole panel, whose number of columns is a multiple of kLanes.
template <class Dot, bool ADD, int ROWS>
inline void product(const uint32_t* const* rows, const uint32_t* columns, int64_t stride, int64_t units, float* sums,
                    int64_t width) {
  int64_t c = 0;
  for (; c + kMostVectors * kLanes <= stride; c += kMostVectors * kLanes)
    product_tile<Dot, ADD, ROWS, kMostVectors>(rows, columns + c, stride, units, sums + c, width);
  for (; c + 2 * kLanes <= stride; c += 2 * kLanes)
    product_tile<Dot, ADD, ROWS, 2>(rows, columns + c, stride, units, sums + c, width);
  for (; c < stride; c += kLanes)
    product_tile<Dot, ADD, ROWS, 1>(rows, columns + c, stride, units, sums + c, width);
}
