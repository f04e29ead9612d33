// A whole block of the model in one call: the other kernels in a row, with what lies between them in memory that stays
// in the cache. For a single token the calls from Python would otherwise take as long as a tenth of the work.
#include <algorithm>
#include <vector>

#include "simd.h"

struct Linear;
struct Cache;
struct Step;

extern "C" {
void linear(const Linear*, const void* x, int64_t rows, void* y, int threads);
void rms_norm(int is_bf16, const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps, int threads);
void rope(int is_bf16, void* x, int64_t stride, int64_t rows, int64_t heads, int64_t head_dim, const float* cos,
          const float* sin, int64_t positions, int threads);
void paged_attention(const Cache*, const Step*, void* keys, void* values, int64_t heads, const void* query,
                     int64_t query_stride, const void* key, int64_t key_stride, const void* value, int64_t value_stride,
                     void* out, float scale, int threads);

// PackedBlock in modules.py holds one; the fields are in the same order there.
struct Block {
  const Linear *qkv, *o, *gate_up, *down;
  const void *input_norm, *post_attention_norm;
  int64_t hidden, heads, kv_heads, head_dim, intermediate;
  float eps;
  int32_t is_bf16;
};
}

namespace {

template <class T>
void add_rows(const T* x, const T* y, T* sum, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes)
    store_f32(sum + i, load_f32(x + i, count - i) + load_f32(y + i, count - i), count - i);
}

void add(bool is_bf16, const void* x, const void* y, void* sum, int64_t count) {
  if (is_bf16)
    add_rows((const bf16*)x, (const bf16*)y, (bf16*)sum, count);
  else
    add_rows((const float*)x, (const float*)y, (float*)sum, count);
}

}  // namespace

// x and out [rows, hidden], which may not overlap.
extern "C" void block(const Block* b, const Cache* cache, const Step* step, void* keys, void* values, const void* x,
                      void* out, int64_t rows, const float* cos, const float* sin, int64_t positions, float scale,
                      int threads) {
  const int64_t size = b->is_bf16 ? 2 : 4, width = (b->heads + 2 * b->kv_heads) * b->head_dim;
  const int64_t attended = b->heads * b->head_dim, between = std::max(width, b->intermediate);
  static thread_local std::vector<char> memory;
  const int64_t needed = rows * (b->hidden + between + attended) * size + 3 * 64;
  if (int64_t(memory.size()) < needed) memory.resize(needed);
  const auto aligned = [](char* p) { return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63)); };
  char* const h = aligned(memory.data());
  char* const qkv = aligned(h + rows * b->hidden * size);
  char* const a = aligned(qkv + rows * between * size);

  rms_norm(b->is_bf16, x, b->input_norm, h, rows, b->hidden, b->eps, threads);
  linear(b->qkv, h, rows, qkv, threads);
  rope(b->is_bf16, qkv, width, rows, b->heads + b->kv_heads, b->head_dim, cos, sin, positions, threads);
  char* const k = qkv + attended * size;
  char* const v = k + b->kv_heads * b->head_dim * size;
  paged_attention(cache, step, keys, values, b->heads, qkv, width, k, width, v, width, a, scale, threads);
  linear(b->o, a, rows, h, threads);
  add(b->is_bf16, x, h, out, rows * b->hidden);
  rms_norm(b->is_bf16, out, b->post_attention_norm, h, rows, b->hidden, b->eps, threads);
  char* const m = qkv;
  linear(b->gate_up, h, rows, m, threads);
  linear(b->down, m, rows, h, threads);
  add(b->is_bf16, out, h, out, rows * b->hidden);
}
