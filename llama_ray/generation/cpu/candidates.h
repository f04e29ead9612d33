#pragma once

#include <vector>

#include "simd.h"

// Memory for one row after another.
struct Candidates {
  std::vector<int32_t> most;
  std::vector<uint64_t> found;
};

// The `width` <= size largest of a row of logits, the largest first and equal ones by ascending id.
void top_row(const float* row, int64_t size, int64_t width, float* values, int64_t* ids, Candidates& s);
