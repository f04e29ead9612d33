// x [rows, in_features] times a packed weight matrix, transposed -> [rows, out_features]. The activation that follows in the
// model is applied while the sums are still in the cache. Weights are stored in panels of 64 columns (outputs), as linear.py
// packs them.
#include <algorithm>
#include <vector>

#include "abi.h"
#include "product.h"

namespace {

constexpr int kPanel = 64;
constexpr int kGroup = 64;  // inputs that share the scale of an int4 weight or of a quantised activation
constexpr int kGroupUnits = kGroup / 4;

// In the order of FORMATS in linear.py.
enum Format : int32_t { kFloat32, kBFloat16, kInt8, kInt4 };

using Sums = float[kMostRows][kPanel];

// Weights of the same type as the activations: a row of x is used in place.
template <class Dot>
struct Plain {
  using Row = uint32_t;

  static int64_t panel_bytes(const Linear& l) { return (l.in_features / Dot::kDepth) * kPanel * 4; }

  __attribute__((noinline)) static void tile(const Linear& l, int64_t panel, const Row* const* rows, int count,
                                             Sums sums) {
    const auto* columns = reinterpret_cast<const uint32_t*>(l.weight + panel * panel_bytes(l));
    with_rows(count, [&](auto n) {
      product<Dot, false, decltype(n)::value>(rows, columns, kPanel, l.in_features / Dot::kDepth, sums[0], kPanel);
    });
  }
};

// 64 values of an activation as signed bytes.
struct Group {
  uint32_t units[kGroupUnits];
  float scale;
  int32_t sum;  // of the bytes: stored weights are unsigned, and their offset adds a multiple of this to every product
};

struct Int8 {
  static constexpr int kWords = 16;  // 32-bit words of a column in a group
  static constexpr int kZero = 128;  // the byte that represents 0
  static U32 unpack(U32 word, int) { return word; }
  static constexpr bool kScaledGroups = false;
};

struct Int4 {
  static constexpr int kWords = 8;  // low halves of the bytes hold values 0 to 31 of the group, high halves 32 to 63
  static constexpr int kZero = 8;
  static U32 unpack(U32 word, int part) { return (part ? word >> 4 : word) & 0x0f0f0f0fu; }
  static constexpr bool kScaledGroups = true;
};

// Sums of bytes over a group are exact, in int32; groups are added in fp32, in order.
template <class W, int ROWS, int VECTORS>
inline void quantised_tile(const Group* const* rows, const uint32_t* columns, const bf16* scales, int64_t groups,
                           float (*sums)[kPanel]) {
  F32 total[ROWS][VECTORS] = {};
  for (int64_t g = 0; g < groups; ++g) {
    I32 sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = broadcast(-W::kZero * rows[r][g].sum);
#pragma GCC unroll 16
    for (int w = 0; w < W::kWords; ++w, columns += kPanel) {
      U32 word[VECTORS];
      for (int v = 0; v < VECTORS; ++v) word[v] = load<U32>(columns + v * kLanes);
#pragma GCC unroll 2
      for (int part = 0; part < kGroupUnits / W::kWords; ++part)
        for (int r = 0; r < ROWS; ++r) {
          const U32 x = broadcast(rows[r][g].units[w + part * W::kWords]);
          for (int v = 0; v < VECTORS; ++v) sum[r][v] = dot_bytes(sum[r][v], W::unpack(word[v], part), x);
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
      F32 scale;
      if (W::kScaledGroups) scale = load_f32(scales + g * kPanel + v * kLanes);
      for (int r = 0; r < ROWS; ++r) {
        F32 value = __builtin_convertvector(sum[r][v], F32);
        if (W::kScaledGroups) value *= scale;
        total[r][v] = fma(value, broadcast(rows[r][g].scale), total[r][v]);
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) store(sums[r] + v * kLanes, total[r][v]);
}

template <class W>
struct Quantised {
  using Row = Group;

  static int64_t groups(const Linear& l) { return (l.in_features + kGroup - 1) / kGroup; }
  static int64_t panel_bytes(const Linear& l) { return groups(l) * W::kWords * kPanel * 4; }

  __attribute__((noinline)) static void tile(const Linear& l, int64_t panel, const Row* const* rows, int count,
                                             Sums sums) {
    const auto* columns = reinterpret_cast<const uint32_t*>(l.weight + panel * panel_bytes(l));
    const bf16* scales = W::kScaledGroups ? static_cast<const bf16*>(l.scales) + panel * groups(l) * kPanel : nullptr;
    with_rows(count, [&](auto n) {
      // Each row keeps two sets of sums, so many rows take half as many columns at once. Few rows take the widest
      // panel: a single row then reads memory in one stream.
      constexpr int ROWS = decltype(n)::value, VECTORS = ROWS <= kMostRows / 2 ? kMostVectors : kMostVectors / 2;
      for (int c = 0; c < kPanel; c += VECTORS * kLanes)
        quantised_tile<W, ROWS, VECTORS>(rows, columns + c, scales + c, groups(l),
                                         reinterpret_cast<float(*)[kPanel]>(&sums[0][c]));
    });
    if (!W::kScaledGroups) {
      const float* channel = static_cast<const float*>(l.scales) + panel * kPanel;
      for (int r = 0; r < count; ++r)
        for (int c = 0; c < kPanel; c += kLanes)
          store(sums[r] + c, load<F32>(sums[r] + c) * load<F32>(channel + c));
    }
  }

  // Round symmetrically to -127 .. 127; the scale is the group's largest absolute value / 127.
  template <class X>
  static void quantise(const X* x, int64_t size, Group* row) {
    for (int64_t start = 0; start < size; start += kGroup, ++row) {
      F32 values[kGroup / kLanes], most = {};
      for (int i = 0; i < kGroup / kLanes; ++i) {
        const int64_t left = size - start - i * kLanes;
        values[i] = left > 0 ? load_f32(x + start + i * kLanes, left) : F32{};
        most = max(most, abs(values[i]));
      }
      row->scale = max_lanes(most) / 127.0f;
      const float inverse = row->scale > 0 ? 1.0f / row->scale : 0.0f;
      const float shift = 12582912.0f;  // rounds to the nearest integer, ties to even
      I32 sum = {};
      for (int i = 0; i < kGroup / kLanes; ++i) {
        const I32 whole = __builtin_convertvector((values[i] * inverse + shift) - shift, I32);
        sum += whole;
        store(reinterpret_cast<int8_t*>(row->units) + i * kLanes, __builtin_convertvector(whole, I8));
      }
      row->sum = 0;
      for (int i = 0; i < kLanes; ++i) row->sum += sum[i];
    }
  }
};

template <class Y>
void store_columns(const Linear& l, int64_t panel, const float* sums, Y* y) {
  const int64_t first = panel * kPanel;
  for (int c = 0; c < kPanel && first + c < l.out_features; c += kLanes)
    store_f32(y + first + c, load<F32>(sums + c), l.out_features - first - c);
}

// silu(gate) * up; a panel holds 32 columns of each. Values are rounded wherever the plain model stores a tensor.
template <class Y>
void store_gated(const Linear& l, int64_t panel, const float* sums, Y* y) {
  const int64_t half = kPanel / 2, first = panel * half;
  for (int c = 0; c < half && first + c < l.out_features; c += kLanes) {
    const F32 gate = rounded<Y>(load<F32>(sums + c)), up = rounded<Y>(load<F32>(sums + half + c));
    const F32 silu = rounded<Y>(gate / (1.0f + exp(-gate)));
    store_f32(y + first + c, silu * up, l.out_features - first - c);
  }
}

// Gates in the first half of a row of y, ups in the second.
template <class Y>
void store_apart(const Linear& l, int64_t panel, const float* sums, Y* y) {
  const int64_t half = kPanel / 2, first = panel * half;
  for (int c = 0; c < half && first + c < l.out_features; c += kLanes) {
    const int64_t left = l.out_features - first - c;
    store_f32(y + first + c, load<F32>(sums + c), left);
    store_f32(y + l.out_features + first + c, load<F32>(sums + half + c), left);
  }
}

// A work item is a tile: up to kMostRows rows times one panel. A thread's items are adjacent, so that all rows use a panel
// while it is in the cache.
template <class F, class X, class Y>
void multiply(const Linear& l, const X* x, int64_t rows, Y* y, bool apart, int threads) {
  constexpr bool quantised = std::is_same_v<typename F::Row, Group>;
  const int64_t per_panel = l.is_gated ? kPanel / 2 : kPanel;
  const int64_t panels = (l.out_features + per_panel - 1) / per_panel, tiles = (rows + kMostRows - 1) / kMostRows;
  const int64_t groups = (l.in_features + kGroup - 1) / kGroup;
  static thread_local std::vector<Group> scratch;
  if (quantised && scratch.size() < size_t(rows * groups)) scratch.resize(rows * groups);
  Group* const x_groups = scratch.data();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if constexpr (quantised) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) F::quantise(x + r * l.in_features, l.in_features, x_groups + r * groups);
    }
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < panels * tiles; ++item) {
      const int64_t panel = item / tiles, tile = item % tiles;
      const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      const typename F::Row* row[kMostRows];
      for (int64_t r = 0; r < count; ++r) {
        if constexpr (quantised)
          row[r] = x_groups + (first + r) * groups;
        else
          row[r] = reinterpret_cast<const uint32_t*>(x + (first + r) * l.in_features);
      }
      alignas(64) Sums sums;
      F::tile(l, panel, row, int(count), sums);
      for (int64_t r = 0; r < count; ++r) {
        Y* to = y + (first + r) * l.out_features * (apart ? 2 : 1);
        if (apart)
          store_apart(l, panel, sums[r], to);
        else if (l.is_gated)
          store_gated(l, panel, sums[r], to);
        else
          store_columns(l, panel, sums[r], to);
      }
    }
  }
}

template <class W>
void multiply_quantised(const Linear& l, const void* x, int64_t rows, void* y, bool apart, int threads) {
  using F = Quantised<W>;
  if (!l.x_is_bf16) return multiply<F>(l, (const float*)x, rows, (float*)y, apart, threads);
  if (!l.y_is_bf16) return multiply<F>(l, (const bf16*)x, rows, (float*)y, apart, threads);
  multiply<F>(l, (const bf16*)x, rows, (bf16*)y, apart, threads);
}

void multiply_any(const Linear& l, const void* x, int64_t rows, void* y, bool apart, int threads) {
  switch (l.format) {
    case kFloat32: return multiply<Plain<Float32>>(l, (const float*)x, rows, (float*)y, apart, threads);
    case kBFloat16:
      if (!l.y_is_bf16) return multiply<Plain<BFloat16>>(l, (const bf16*)x, rows, (float*)y, apart, threads);
      return multiply<Plain<BFloat16>>(l, (const bf16*)x, rows, (bf16*)y, apart, threads);
    case kInt8: return multiply_quantised<Int8>(l, x, rows, y, apart, threads);
    case kInt4: return multiply_quantised<Int4>(l, x, rows, y, apart, threads);
  }
}

}  // namespace

extern "C" void linear(const Linear* l, const void* x, int64_t rows, void* y, int threads) {
  multiply_any(*l, x, rows, y, false, threads);
}

extern "C" void linear_apart(const Linear* l, const void* x, int64_t rows, void* y, int threads) {
  multiply_any(*l, x, rows, y, true, threads);
}
