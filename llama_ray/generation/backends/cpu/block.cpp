// All blocks of the model in one call: runs the other kernels in turn and keeps what passes between them in memory that
// stays in the processor's cache. For a single token, separate calls from Python would add about a tenth to the time.
#include <algorithm>
#include <vector>

#include "abi.h"
#include "simd.h"

namespace {

struct Rope {
  const float *cos, *sin;  // [positions, head_dim / 2]
  int64_t positions;
};

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

// Memory for `count` tensors, each aligned to a cache line.
struct BlockMemory {
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

// The tensors between the kernels of a block.
struct Intermediates {
  char* hidden;    // [rows, hidden_size]
  char* wide;      // [rows, widest product]
  char* attended;  // [rows, heads * head_dim]
  char* apart;     // [rows, 2 * intermediate_size], in steps with adapters
};

// In the order in which a block computes them.
enum Product : int64_t { kQkv, kO, kGateUp, kDown, kProducts };

// The adapters of a step at one block: `add` does nothing in a step without any.
struct Adapted {
  const AdapterStep* step;
  int64_t layer;
  int is_bf16, threads;

  void add(Product product, const void* x, void* y, int64_t width) const {
    if (step) add_adapters(step, layer * kProducts + product, is_bf16, x, y, width, threads);
  }
};

void gated_product(const Block& b, const Adapted& adapted, const Intermediates& m, int64_t rows, int threads) {
  if (!adapted.step) return linear(b.gate_up, m.hidden, rows, m.wide, threads);
  linear_apart(b.gate_up, m.hidden, rows, m.apart, threads);
  adapted.add(kGateUp, m.hidden, m.apart, 2 * b.intermediate_size);
  silu_product(b.is_bf16, m.apart, m.wide, rows, b.intermediate_size, threads);
}

// x and out [rows, hidden_size] must not overlap.
void run_block(const Block& b, const Cache* cache, const Step* step, void* keys, void* values, const void* x, void* out,
               const Intermediates& m, int64_t rows, const Rope& r, float scale, const Adapted& adapted, int threads) {
  const int64_t size = b.is_bf16 ? 2 : 4, width = (b.heads + 2 * b.kv_heads) * b.head_dim;
  rms_norm(b.is_bf16, x, b.input_norm, m.hidden, rows, b.hidden_size, b.eps, threads);
  linear(b.qkv, m.hidden, rows, m.wide, threads);
  adapted.add(kQkv, m.hidden, m.wide, width);
  rope(b.is_bf16, m.wide, width, rows, b.heads + b.kv_heads, b.head_dim, r.cos, r.sin, r.positions, threads);
  char* const query = m.wide;
  char* const key = query + b.heads * b.head_dim * size;
  char* const value = key + b.kv_heads * b.head_dim * size;
  paged_attention(cache, step, keys, values, b.heads, query, width, key, width, value, width, m.attended, scale, threads);
  linear(b.o, m.attended, rows, m.hidden, threads);
  adapted.add(kO, m.attended, m.hidden, b.hidden_size);
  add(b.is_bf16, x, m.hidden, out, rows * b.hidden_size);
  rms_norm(b.is_bf16, out, b.post_attention_norm, m.hidden, rows, b.hidden_size, b.eps, threads);
  gated_product(b, adapted, m, rows, threads);
  linear(b.down, m.wide, rows, m.hidden, threads);
  adapted.add(kDown, m.wide, m.hidden, b.hidden_size);
  add(b.is_bf16, out, m.hidden, out, rows * b.hidden_size);
}

}  // namespace

extern "C" void blocks(const Block* const* all, int64_t count, const Cache* cache, const Step* step, void* const* keys,
                       void* const* values, const void* x, void* out, int64_t rows, const float* cos, const float* sin,
                       int64_t positions, float scale, const AdapterStep* adapters, int threads) {
  const Block& b = *all[0];  // All blocks have one shape.
  const int64_t size = b.is_bf16 ? 2 : 4, width = (b.heads + 2 * b.kv_heads) * b.head_dim;
  const int64_t hidden = rows * b.hidden_size * size, wide = rows * std::max(width, b.intermediate_size) * size;
  const int64_t attended = rows * b.heads * b.head_dim * size;
  const int64_t apart = adapters ? 2 * rows * b.intermediate_size * size : 0;
  static thread_local BlockMemory memory;
  memory.reserve(2 * hidden + wide + attended + apart, 5);
  const Intermediates between{memory.take(hidden), memory.take(wide), memory.take(attended), memory.take(apart)};
  void* const other = memory.take(hidden);
  const void* from = x;
  for (int64_t i = 0; i < count; ++i) {
    void* const to = (count - i) % 2 ? out : other;  // Results alternate so that the last one goes to `out`.
    run_block(*all[i], cache, step, keys[i], values[i], from, to, between, rows, {cos, sin, positions}, scale,
              {adapters, i, b.is_bf16, threads}, threads);
    from = to;
  }
}
