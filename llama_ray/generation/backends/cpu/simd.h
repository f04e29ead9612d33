// Vectors of the processor's own width, and the few operations that need its special instructions. All other sources are
// plain C++ over these types, so the same code runs with AVX-512, with AVX2 and on arm64.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LLAMA_RAY_AVX512
constexpr int kLanes = 16;
constexpr bool kManyRegisters = true;  // 32 vector registers
#elif defined(__AVX2__) && defined(__FMA__)
#define LLAMA_RAY_AVX2
constexpr int kLanes = 8;
constexpr bool kManyRegisters = false;  // 16
#else
constexpr int kLanes = 4;
#if defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif
#endif

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));
typedef int8_t I8 __attribute__((vector_size(kLanes)));

struct bf16 {
  uint16_t bits;
};

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);  // one unaligned load
  return v;
}

template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

inline F32 broadcast(float x) { return x - F32{}; }  // x - 0 keeps every x, -0 included
inline I32 broadcast(int32_t x) { return x - I32{}; }
inline U32 broadcast(uint32_t x) { return x - U32{}; }

inline I32 lane_index() {
  I32 index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return index;
}

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(LLAMA_RAY_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(LLAMA_RAY_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline F32 max(F32 a, F32 b) { return a > b ? a : b; }
inline I32 max(I32 a, I32 b) { return a > b ? a : b; }
inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
inline F32 abs(F32 x) { return (F32)((U32)x & 0x7fffffffu); }

// The sum and the maximum of all lanes, by halves: the order is the same on all machines with one vector width.
inline float sum_lanes(F32 v) {
#if defined(LLAMA_RAY_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
#endif
}

inline float max_lanes(F32 v) {
#if defined(LLAMA_RAY_AVX512)
  return _mm512_reduce_max_ps(v);
#else
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
#endif
}

// Whether the comparison `mask` holds in any lane.
inline bool any(I32 mask) {
#if defined(LLAMA_RAY_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(LLAMA_RAY_AVX2)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

// Round to the nearest whole number, ties to even.
inline F32 round_even(F32 x) {
#if defined(LLAMA_RAY_AVX512)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(LLAMA_RAY_AVX2)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (F32)vrndnq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::nearbyint(x[i]);
  return x;
#endif
}

inline F32 widen(U16 bits) { return (F32)(__builtin_convertvector(bits, U32) << 16); }

// Round to the nearest bfloat16, ties to even.
inline U16 narrow(F32 x) {
#if defined(LLAMA_RAY_AVX512) && defined(__AVX512BF16__)
  return (U16)_mm512_cvtneps_pbh(x);
#else
  const U32 bits = (U32)x;
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet_nan, U16);
#endif
}

inline F32 load_f32(const float* from) { return load<F32>(from); }
inline F32 load_f32(const bf16* from) { return widen(load<U16>(from)); }
inline void store_f32(float* to, F32 x) { store(to, x); }
inline void store_f32(bf16* to, F32 x) { store(to, narrow(x)); }

// The first `count` lanes only: the others are loaded as 0 and not stored.
template <class T>
inline F32 load_f32(const T* from, int64_t count) {
  if (count >= kLanes) return load_f32(from);
  T all[kLanes] = {};
  std::memcpy(all, from, count * sizeof(T));
  return load_f32(all);
}

template <class T>
inline void store_f32(T* to, F32 x, int64_t count) {
  if (count >= kLanes) return store_f32(to, x);
  T all[kLanes];
  store_f32(all, x);
  std::memcpy(to, all, count * sizeof(T));
}

// The value of x after it has been stored as a T.
template <class T>
inline F32 rounded(F32 x);
template <>
inline F32 rounded<float>(F32 x) { return x; }
template <>
inline F32 rounded<bf16>(F32 x) { return widen(narrow(x)); }

// e^x with a relative error of about 1e-7; 0 below -87, where the result would be subnormal. The polynomial of Cephes' expf
// (Moshier 1989) for |r| <= ln(2) / 2, where x = n ln(2) + r. exp(0) is exactly 1, which attention relies on.
inline F32 exp(F32 x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding this leaves the nearest integer in the low bits
  const F32 clamped = min(max(x, broadcast(-87.0f)), broadcast(88.7f));
  const F32 shifted = fma(clamped, broadcast(1.44269504f), broadcast(shift));
  const F32 n = shifted - shift;
  const F32 r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), clamped));
  F32 p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const F32 power = (F32)(((U32)shifted + 127u) << 23);
  const F32 result = x < -87.0f ? F32{} : p * power;
  return x == x ? result : x;
}
