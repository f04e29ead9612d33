// The largest logits of each row, in order.
#include <algorithm>
#include <limits>

#include "candidates.h"

#include "abi.h"

namespace {

// Integers in the order of the floats; -0 becomes 0. NaN has a defined order too, as sorting needs.
inline I32 ordered(F32 x) {
  const I32 bits = (I32)(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float restored(int32_t key) {
  key ^= (key >> 31) & 0x7fffffff;
  float x;
  std::memcpy(&x, &key, 4);
  return x;
}

// A bound that at least `width` of the row's keys reach, and few others: the width-th largest of the maxima of chunks. A
// chunk is one lane of `vectors` adjacent vectors. With 8 * width chunks, few chunks hold two of the largest keys.
int32_t lower_bound(const float* row, int64_t size, int64_t width, std::vector<int32_t>& maxima) {
  const int64_t whole = size / kLanes;
  const int64_t vectors = std::max<int64_t>(1, whole * kLanes / (8 * width));
  maxima.clear();
  for (int64_t first = 0; first < whole; first += vectors) {
    I32 high = ordered(load<F32>(row + first * kLanes));
    for (int64_t v = first + 1; v < std::min(first + vectors, whole); ++v)
      high = max(high, ordered(load<F32>(row + v * kLanes)));
    maxima.resize(maxima.size() + kLanes);
    store(maxima.data() + maxima.size() - kLanes, high);
  }
  if (int64_t(maxima.size()) < width) return std::numeric_limits<int32_t>::min();
  std::nth_element(maxima.begin(), maxima.begin() + width - 1, maxima.end(), std::greater<>());
  return maxima[width - 1];
}

}  // namespace

void top_row(const float* row, int64_t size, int64_t width, float* values, int64_t* ids, Candidates& s) {
  const int32_t bound = lower_bound(row, size, width, s.maxima);
  // One number holds the inverted logit and the id: ascending, logits fall, and ids rise among equal logits.
  s.found.clear();
  int64_t at_bound = 0;
  const auto take = [&](int32_t key, int64_t id) {
    if (key == bound && ++at_bound > width) return;  // Enough equal keys with lower ids are found.
    s.found.push_back(uint64_t(~(uint32_t(key) ^ 0x80000000u)) << 32 | uint64_t(id));
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const I32 keys = ordered(load<F32>(row + i));
    if (any(keys >= broadcast(bound)))
      for (int lane = 0; lane < kLanes; ++lane)
        if (keys[lane] >= bound) take(keys[lane], i + lane);
  }
  for (; i < size; ++i) {
    const int32_t key = ordered(broadcast(row[i]))[0];
    if (key >= bound) take(key, i);
  }
  std::partial_sort(s.found.begin(), s.found.begin() + width, s.found.end());
  for (int64_t n = 0; n < width; ++n) {
    values[n] = restored(int32_t(~uint32_t(s.found[n] >> 32) ^ 0x80000000u));
    ids[n] = int64_t(s.found[n] & 0xffffffffu);
  }
}

extern "C" void top_candidates(const float* logits, int64_t rows, int64_t size, int64_t width, float* values, int64_t* ids,
                               int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
  {
    Candidates scratch;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      top_row(logits + r * size, size, width, values + r * width, ids + r * width, scratch);
  }
}
