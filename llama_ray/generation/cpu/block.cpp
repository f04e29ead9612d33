// All blocks of the model in one call: the other kernels in a row, with what lies between them in memory that stays in the
// cache. For a single token the calls from Python would otherwise take as long as a tenth of the work.
#include <algorithm>
#include <vector>

#include "simd.h"

struct Linear;
struct Cache;
struct Step;

namespace {
struct Rope {
  const float *cos, *sin;  // [positions, head_dim / 2]
  int64_t positions;
};
}  // namespace

extern "C" {
void linear(const Linear*, const void* x, int64_t rows, void* y, int threads);
void rms_norm(int is_bf16, const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps, int threads);
void rope(int is_bf16, void* x, int64_t stride, int64_t rows, int64_t heads, int64_t head_dim, const float* cos,
          const float* sin, int64_t positions, int threads);
void paged_attention(const Cache*, const Step*, void* keys, void* values, int64_t heads, const void* query,
                     int64_t query_stride, const void* key, int64_t key_stride, const void* value, int64_t value_stride,
                     void* out, float scale, int threads);

// PackedBlocks in modules.py holds one for each; the fields are in the same order there.
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

// Memory for `count` tensors, each at the beginning of a cache line.
struct BlockScratch {
  std::vector<char> memory;
  char* next;

  void reserve(int64_t bytes, int count) {
    if (int64_t(memory.size()) < bytes + count * 64) memory.resize(bytes + count * 64);
    next = memory.data();
  }
  char* take(int64_t bytes) {
    char* const start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(next) + 63) & ~uintptr_t(63));
    next = start + bytes;
    return start;
  }
};

// x and out [rows, hidden], which may not overlap; h [rows, hidden], m [rows, widest product], a [rows, heads] in between.
void block(const Block& b, const Cache* cache, const Step* step, void* keys, void* values, const void* x, void* out,
           char* h, char* m, char* a, int64_t rows, const Rope& r, float scale, int threads) {
  const int64_t size = b.is_bf16 ? 2 : 4, width = (b.heads + 2 * b.kv_heads) * b.head_dim;
  rms_norm(b.is_bf16, x, b.input_norm, h, rows, b.hidden, b.eps, threads);
  linear(b.qkv, h, rows, m, threads);
  rope(b.is_bf16, m, width, rows, b.heads + b.kv_heads, b.head_dim, r.cos, r.sin, r.positions, threads);
  char* const k = m + b.heads * b.head_dim * size;
  char* const v = k + b.kv_heads * b.head_dim * size;
  paged_attention(cache, step, keys, values, b.heads, m, width, k, width, v, width, a, scale, threads);
  linear(b.o, a, rows, h, threads);
  add(b.is_bf16, x, h, out, rows * b.hidden);
  rms_norm(b.is_bf16, out, b.post_attention_norm, h, rows, b.hidden, b.eps, threads);
  linear(b.gate_up, h, rows, m, threads);
  linear(b.down, m, rows, h, threads);
  add(b.is_bf16, out, h, out, rows * b.hidden);
}

}  // namespace

// x and out [rows, hidden], which may not overlap. All blocks are of one shape; keys and values hold a pointer for each.
extern "C" void blocks(const Block* const* all, int64_t count, const Cache* cache, const Step* step, void* const* keys,
                       void* const* values, const void* x, void* out, int64_t rows, const float* cos, const float* sin,
                       int64_t positions, float scale, int threads) {
  const Block& b = *all[0];
  const int64_t size = b.is_bf16 ? 2 : 4, width = (b.heads + 2 * b.kv_heads) * b.head_dim;
  const int64_t hidden = rows * b.hidden * size, between = rows * std::max(width, b.intermediate) * size;
  const int64_t attended = rows * b.heads * b.head_dim * size;
  static thread_local BlockScratch scratch;
  scratch.reserve(2 * hidden + between + attended, 4);
  char *const h = scratch.take(hidden), *const m = scratch.take(between), *const a = scratch.take(attended);
  void* const other = scratch.take(hidden);
  const void* from = x;
  for (int64_t i = 0; i < count; ++i) {
    void* const to = (count - i) % 2 ? out : other;  // the last one writes to out
    block(*all[i], cache, step, keys[i], values[i], from, to, h, m, a, rows, {cos, sin, positions}, scale, threads);
    from = to;
  }
}
