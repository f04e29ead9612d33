#pragma once

#include <vector>

#include "simd.h"

// Memory for one row at a time.
struct Candidates {
  std::vector<int32_t> maxima;
  std::vector<uint64_t> found;
};

// The `width` <= size largest of a row of logits, in descending order; equal ones are in order of their ids.
void top_row(const float* row, int64_t size, int64_t width, float* values, int64_t* ids, Candidates& s);
