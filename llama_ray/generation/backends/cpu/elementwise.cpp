// RMS norm and rotary embedding, with the rounding of model/layers.py.
#include "abi.h"
#include "simd.h"

namespace {

// With fewer values a second thread costs more time than it saves.
constexpr int64_t kWorthThreads = 16384;

template <class T>
void rms_norm_rows(const T* x, const T* weight, T* y, int64_t rows, int64_t size, float eps, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * size >= kWorthThreads)
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * size;
    F32 squares[4] = {};  // Four independent sums hide the latency of additions.
    for (int64_t i = 0, k = 0; i < size; i += kLanes, k = (k + 1) % 4) {
      const F32 value = load_f32(from + i, size - i);
      squares[k] = fma(value, value, squares[k]);
    }
    const float mean = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / size;
    const float scale = 1.0f / std::sqrt(mean + eps);
    for (int64_t i = 0; i < size; i += kLanes) {
      const F32 normed = rounded<T>(load_f32(from + i, size - i) * scale);
      store_f32(y + r * size + i, normed * load_f32(weight + i, size - i), size - i);
    }
  }
}

// Rotates the pairs (x_i, x_{i + d/2}) of the first `heads` heads of each row, in place.
template <class T>
void rope_rows(T* x, int64_t stride, int64_t rows, int64_t heads, int64_t head_dim, const float* cos,
               const float* sin, int64_t positions, int threads) {
  const int64_t half = head_dim / 2;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * heads * head_dim >= kWorthThreads)
  for (int64_t r = 0; r < rows; ++r) {
    const float *c = cos + r % positions * half, *s = sin + r % positions * half;
    for (int64_t h = 0; h < heads; ++h) {
      T* const first = x + r * stride + h * head_dim;
      T* const second = first + half;
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t left = half - i;
        const F32 a = load_f32(first + i, left), b = load_f32(second + i, left);
        const F32 cosine = load_f32(c + i, left), sine = load_f32(s + i, left);
        store_f32(first + i, a * cosine - b * sine, left);
        store_f32(second + i, b * cosine + a * sine, left);
      }
    }
  }
}

}  // namespace

extern "C" void rms_norm(int is_bf16, const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps,
                         int threads) {
  if (is_bf16)
    rms_norm_rows((const bf16*)x, (const bf16*)weight, (bf16*)y, rows, size, eps, threads);
  else
    rms_norm_rows((const float*)x, (const float*)weight, (float*)y, rows, size, eps, threads);
}

extern "C" void rope(int is_bf16, void* x, int64_t stride, int64_t rows, int64_t heads, int64_t head_dim,
                     const float* cos, const float* sin, int64_t positions, int threads) {
  if (is_bf16)
    rope_rows((bf16*)x, stride, rows, heads, head_dim, cos, sin, positions, threads);
  else
    rope_rows((float*)x, stride, rows, heads, head_dim, cos, sin, positions, threads);
}
