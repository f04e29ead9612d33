// Draws one token per row: draw_filtered and draw_from_all of sampling/draw.py, with the same order of operations, the same
// exact sums and the same race. Masses are whole numbers in units of 2^-36 of the most probable token's mass, so that sums in
// double are exact.
#include <algorithm>
#include <limits>
#include <vector>

#include "abi.h"
#include "candidates.h"

namespace {

constexpr int kHalf = kLanes / 2;  // numbers of 64 bits in a vector
typedef uint64_t U64 __attribute__((vector_size(kHalf * 8)));
typedef double F64 __attribute__((vector_size(kHalf * 8)));
typedef float HalfF32 __attribute__((vector_size(kHalf * 4)));

constexpr float kUnits = 68719476736.0f;               // 2^36
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15u;  // the increment of SplitMix64

// The finaliser of SplitMix64, for numbers or vectors; see sampling/noise.py.
template <class T>
inline T mixed(T z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// Finds the token whose exponentially distributed number, divided by its mass, is smallest.
class Race {
 public:
  Race(uint64_t noise_key, int64_t token) : noise_key_(noise_key), token_(token) {
    for (int i = 0; i < kHalf; ++i) steps_[i] = kGamma * uint64_t(i);
  }

  int64_t winner() const { return token_; }

  void enter(int64_t token, float mass) {
    enter(token, mass, (double(mixed(noise_key_ + kGamma * uint64_t(token)) >> 12) + 0.5) * 0x1p-52);
  }

  // Enter kLanes tokens, beginning with `first`.
  void enter(int64_t first, const float* masses) {
    for (int half = 0; half < kLanes; half += kHalf) {
      const uint64_t start = noise_key_ + kGamma * uint64_t(first + half);
      const F64 v = (__builtin_convertvector(mixed(start + steps_) >> 12, F64) + 0.5) * 0x1p-52;
      const auto may_win = v < best_ * __builtin_convertvector(load<HalfF32>(masses + half), F64);
      if (any((I32)may_win))
        for (int i = 0; i < kHalf; ++i)
          if (may_win[i]) enter(first + half + i, masses[half + i], v[i]);
    }
  }

 private:
  // -log(1 - v) is at least v, which rules out most tokens without a logarithm.
  void enter(int64_t token, float mass, double v) {
    if (!(mass > 0) || v >= best_ * mass) return;
    const double time = -std::log1p(-v) / mass;
    if (time < best_) best_ = time, token_ = token;
  }

  uint64_t noise_key_;
  int64_t token_;
  U64 steps_;
  double best_ = 1e300;  // Finite, because infinity times a mass of 0 would be NaN.
};

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

// The mass of the whole vocabulary.
double total_mass(const float* row, int64_t size, float top, float temperature) {
  double total = 0;
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 mass = mass_of((load_f32(row + i, size - i) - top) / temperature);
    for (int lane = 0; lane < std::min<int64_t>(kLanes, size - i); ++lane) total += mass[lane];
  }
  return total;
}

// Returns the token of row `r`; sets `is_short` if it must be drawn again from more candidates.
int64_t draw_row(const float* row, int64_t size, const DrawArguments& d, int64_t r, DrawScratch& s, bool& is_short) {
  const int64_t width = d.width;
  top_row(row, size, width, s.values.data(), s.ids.data(), s.candidates);
  const float top = s.values[0], temperature = d.temperature[r];
  for (int64_t i = 0; i < width; i += kLanes) {
    const F32 shifted = (load<F32>(s.values.data() + i) - top) / temperature;
    store(s.shifted.data() + i, shifted);
    store(s.mass.data() + i, mass_of(shifted));
  }
  const uint8_t* const outside_top_k = d.outside_top_k + r * width;
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    if (outside_top_k[i]) s.mass[i] = 0;
    s.running[i] = sum += s.mass[i];
  }
  double total = sum;
  if (d.may_be_short && d.no_top_k[r]) {
    total = total_mass(row, size, top, temperature);
    is_short = sum < d.top_p[r] * total;
  }
  const double limit = d.top_p[r] * total;  // A token is kept if the mass before it is below this.
  Race race(d.noise_keys[r], s.ids[0]);
  for (int64_t i = 0; i < width; ++i)
    if (s.running[i] - s.mass[i] < limit && (!d.log_min_p || s.shifted[i] >= d.log_min_p[r])) race.enter(s.ids[i], s.mass[i]);
  return race.winner();
}

int64_t draw_from_all_row(const float* row, int64_t size, const DrawArguments& d, int64_t r) {
  F32 maximum = broadcast(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < size; i += kLanes) {
    F32 x = load_f32(row + i, size - i);
    if (size - i < kLanes) x = lane_index() < broadcast(int32_t(size - i)) ? x : maximum;
    maximum = max(x, maximum);
  }
  const float top = max_lanes(maximum), temperature = d.temperature[r];
  const F32 least = broadcast(d.log_min_p ? d.log_min_p[r] : -std::numeric_limits<float>::infinity());
  Race race(d.noise_keys[r], 0);
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32 shifted = (load_f32(row + i, size - i) - top) / temperature;
    F32 mass = shifted >= least ? mass_of(shifted) : F32{};
    if (size - i < kLanes) mass = lane_index() < broadcast(int32_t(size - i)) ? mass : F32{};
    alignas(64) float masses[kLanes];
    store(masses, mass);
    race.enter(i, masses);
  }
  return race.winner();
}

}  // namespace

extern "C" void draw(const float* logits, const int64_t* selected, int64_t rows, int64_t size, const DrawArguments* d,
                     int64_t* tokens, uint8_t* are_short, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1 && rows > 1)
  {
    DrawScratch scratch(d->width);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      const float* const row = logits + (selected ? selected[r] : r) * size;
      if (d->width) {
        bool is_short = false;
        tokens[r] = draw_row(row, size, *d, r, scratch, is_short);
        are_short[r] = is_short;
      } else {
        tokens[r] = draw_from_all_row(row, size, *d, r);
      }
    }
  }
}
