// One token a row, drawn from its most probable ones: draw_filtered of draw.py, whose order of operations and whose exact
// sums these are. Masses are whole numbers in units of 2^-36 of the most probable token's, so that sums in double are exact.
#include <algorithm>
#include <vector>

#include "candidates.h"

extern "C" {
// The filters and numbers of all rows; ops.py holds one, with the fields in the same order.
struct Draw {
  int64_t width;
  int32_t may_be_short;     // whether `width` candidates may not hold all of a nucleus
  const float* temperature;
  const uint8_t* beyond_k;  // [rows, width]
  const uint8_t* from_all;
  const double* top_p;
  const float* log_min_p;   // null: no row has one
  const double* noise;
};
}

namespace {

constexpr float kUnits = 68719476736.0f;

inline F32 mass_of(F32 shifted) { return round_even(exp(shifted) * kUnits); }

inline int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

struct DrawScratch {
  Candidates candidates;
  std::vector<float> values, shifted, mass;
  std::vector<int64_t> ids;
  std::vector<double> running;

  explicit DrawScratch(int64_t width)
      : values(padded(width)), shifted(padded(width)), mass(padded(width)), ids(width), running(width) {}
};

// Of the whole vocabulary.
double total_mass(const float* row, int64_t size, float top, float temperature) {
  double total = 0;
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 mass = mass_of((load_f32(row + i, size - i) - top) / temperature);
    for (int lane = 0; lane < std::min<int64_t>(kLanes, size - i); ++lane) total += mass[lane];
  }
  return total;
}

// -> the token; `is_short` where it must be drawn again, from more candidates.
int64_t draw_row(const float* row, int64_t size, const Draw& d, int64_t r, DrawScratch& s, bool& is_short) {
  const int64_t width = d.width;
  top_row(row, size, width, s.values.data(), s.ids.data(), s.candidates);
  const float top = s.values[0], temperature = d.temperature[r];
  for (int64_t i = 0; i < width; i += kLanes) {
    const F32 shifted = (load<F32>(s.values.data() + i) - top) / temperature;
    store(s.shifted.data() + i, shifted);
    store(s.mass.data() + i, mass_of(shifted));
  }
  const uint8_t* const beyond_k = d.beyond_k + r * width;
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    if (beyond_k[i]) s.mass[i] = 0;
    s.running[i] = sum += s.mass[i];
  }
  double total = sum;
  if (d.may_be_short && d.from_all[r]) {
    total = total_mass(row, size, top, temperature);
    is_short = sum < d.top_p[r] * total;
  }
  const double limit = d.top_p[r] * total;  // those before a token that is kept do not reach it
  double kept = 0;
  for (int64_t i = 0; i < width; ++i)
    if (s.running[i] - s.mass[i] < limit && (!d.log_min_p || s.shifted[i] >= d.log_min_p[r])) kept += s.mass[i];
  const double at = d.noise[r] * kept;
  int64_t place = 0;
  while (place < width - 1 && s.running[place] <= at) ++place;
  return s.ids[place];
}

}  // namespace

// logits [rows, size] -> tokens [rows], and where they must be drawn again.
extern "C" void draw(const float* logits, int64_t rows, int64_t size, const Draw* d, int64_t* tokens, uint8_t* are_short,
                     int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
  {
    DrawScratch scratch(d->width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      bool is_short = false;
      tokens[r] = draw_row(logits + r * size, size, *d, r, scratch, is_short);
      are_short[r] = is_short;
    }
  }
}
