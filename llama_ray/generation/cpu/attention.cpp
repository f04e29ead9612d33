// Attention over a paged cache: writes a step's keys and values into their blocks, then attends, causally, to all that
// came before. One call a layer.
//
// A block holds, for one key-value head, `block_size` positions as two panels (product.h): keys [head_dim units,
// block_size columns] and values [block_size units, value_dim columns], where value_dim is head_dim rounded up to 16. So
// scores and outputs are both products of rows with a panel.
//
// The softmax is online (Milakov and Gimelshein 2018, arXiv:1805.02867), a block at a time in order of position. Blocks lie
// at multiples of block_size, and what a query computes in a block depends on its position alone: its result does not
// depend on how the prompt was cut into chunks or on what else is in the step.
#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "product.h"

extern "C" {
// CpuCache and its batches hold one of each; the fields are in the same order there.
struct Cache {
  int64_t kv_heads, head_dim, block_size;
  int64_t block_stride;  // bytes from a block to the next
  int32_t is_bf16;
};
struct Step {
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* context_len;  // [sequences]
  const int32_t* block_table;  // [sequences, table_width]
  const int64_t* slots;        // [tokens]
  int64_t sequences, table_width;
};
}

namespace {

// Query rows of a head that go over a block together: many share its trip to the first-level cache, few leave work for all
// threads.
constexpr int kTileRows = 24;
// Rows that a task takes over the blocks. Where a tile has fewer, as in decoding, it takes several heads: their panels are
// neighbours, and memory is read several times as fast in runs of 48 KiB as in runs of 4.
constexpr int kTaskRows = 32;
constexpr int kManyTasks = 4;  // for each thread: so many need not be of one size to end at about the same time

// One layer's cache, in units of 32 bits.
template <class Dot>
struct Blocks {
  int64_t kv_heads, block_size, stride, value_dim, key_units, value_units;
  uint32_t *keys, *values;  // in block 0

  Blocks(const Cache& c, void* keys, void* values)
      : kv_heads(c.kv_heads),
        block_size(c.block_size),
        stride(c.block_stride / 4),
        value_dim((c.head_dim + 15) / 16 * 16),
        key_units(c.head_dim / Dot::kDepth),
        value_units(c.block_size / Dot::kDepth),
        keys(static_cast<uint32_t*>(keys)),
        values(static_cast<uint32_t*>(values)) {}

  uint32_t* key_panel(int64_t block, int64_t head) const {
    return keys + block * stride + head * key_units * block_size;
  }
  uint32_t* value_panel(int64_t block, int64_t head) const {
    return values + block * stride + head * value_units * value_dim;
  }
};

// Where row 0, head 0 lies, and how many values apart two tokens are; heads follow one another.
template <class T>
struct Tokens {
  T* first;
  int64_t stride;
  int64_t head_dim;
  T* at(int64_t token, int64_t head) const { return first + token * stride + head * head_dim; }
};

template <class Dot, class T = typename Dot::Value>
void write(const Blocks<Dot>& blocks, int64_t slot, int64_t head, int64_t head_dim, const T* key, const T* value) {
  const int64_t block = slot / blocks.block_size, offset = slot % blocks.block_size;
  uint32_t* key_unit = blocks.key_panel(block, head) + offset;
  for (int64_t u = 0; u < blocks.key_units; ++u, key_unit += blocks.block_size)
    std::memcpy(key_unit, key + u * Dot::kDepth, 4);
  uint32_t* unit = blocks.value_panel(block, head) + offset / Dot::kDepth * blocks.value_dim;
  for (int64_t d = 0; d < head_dim; ++d) {
    if constexpr (Dot::kDepth == 1)
      std::memcpy(unit + d, value + d, 4);
    else if (offset % 2)
      unit[d] = (unit[d] & 0xffffu) | uint32_t(value[d].bits) << 16;
    else
      unit[d] = value[d].bits;  // and 0 for the next position: what an earlier owner left there may be NaN
  }
}

// What a thread needs to take some rows over the blocks.
struct AttentionScratch {
  std::vector<float> scores, output;  // [kTaskRows, block_size], [kTaskRows, value_dim]
  std::vector<uint32_t> weights;      // [kTaskRows, units of a block]
  alignas(64) float most[kTaskRows], total[kTaskRows], scale[kTaskRows];  // running maximum and sum, and what shrinks them

  AttentionScratch(int64_t block_size, int64_t value_dim)
      : scores(kTaskRows * block_size), output(kTaskRows * value_dim), weights(kTaskRows * block_size) {}
};
static_assert(kTileRows <= kTaskRows && kTaskRows % kLanes == 0);

// The product of up to kTileRows rows, kMostRows at a time.
template <class Dot, bool ADD>
void product_rows(const uint32_t* const* rows, int count, const uint32_t* panel, int64_t columns, int64_t units,
                  float* sums) {
  const int tiles = (count + kMostRows - 1) / kMostRows;
  for (int t = 0; t < tiles; ++t) {
    const int first = count * t / tiles, n = count * (t + 1) / tiles - first;
    with_rows(n, [&](auto constant) {
      product<Dot, ADD, decltype(constant)::value>(rows + first, panel, columns, units, sums + first * columns,
                                                   columns);
    });
  }
}

// Rows `first` .. of one sequence and of each of some key-value heads. A row is a query head of the group at a token: row r
// stands for token r / group.
template <class Dot, class T = typename Dot::Value>
void attend(const Blocks<Dot>& blocks, const int32_t* table, int64_t first_head, int heads, int64_t group,
            const Tokens<const T>& query, const Tokens<T>& out, int64_t token, int64_t position, int64_t first, int rows,
            float scale, AttentionScratch& s) {
  const uint32_t *q[kTaskRows], *w[kTaskRows];
  const int64_t size = blocks.block_size, width = blocks.value_dim;
  const int all = heads * rows;
  const auto place = [&](const auto& tokens, int i) {
    const int64_t r = first + i % rows;
    return tokens.at(token + r / group, (first_head + i / rows) * group + r % group);
  };
  for (int i = 0; i < all; ++i) {
    q[i] = reinterpret_cast<const uint32_t*>(place(query, i));
    w[i] = s.weights.data() + i * blocks.value_units;
  }
  std::fill_n(s.most, kTaskRows, -std::numeric_limits<float>::infinity());
  std::fill_n(s.total, kTaskRows, 0.0f);
  std::fill_n(s.output.data(), all * width, 0.0f);

  const int64_t last = position + (first + rows - 1) / group;  // the position that the last row sees up to
  for (int64_t start = 0; start <= last; start += size) {
    const int64_t block = table[start / size];
    for (int h = 0; h < heads; ++h)
      product_rows<Dot, false>(q + h * rows, rows, blocks.key_panel(block, first_head + h), size, blocks.key_units,
                               s.scores.data() + h * rows * size);

    for (int i = 0; i < all; ++i) {
      const int64_t visible = position + (first + i % rows) / group + 1 - start;
      float* const scores = s.scores.data() + i * size;
      F32 most = broadcast(s.most[i]);
      for (int64_t c = 0; c < size; c += kLanes) {
        F32 score = load<F32>(scores + c) * scale;
        if (visible < c + kLanes)
          score = lane_index() < broadcast(int32_t(visible - c)) ? score : broadcast(-std::numeric_limits<float>::infinity());
        store(scores + c, score);
        most = max(score, most);
      }
      s.scale[i] = s.most[i];
      s.most[i] = max_lanes(most);
    }
    for (int i = 0; i < all; i += kLanes)  // rows beyond the last hold -inf and give NaN, which nobody reads
      store(s.scale + i, exp(load<F32>(s.scale + i) - load<F32>(s.most + i)));
    for (int i = 0; i < all; ++i) {
      const float* const scores = s.scores.data() + i * size;
      T* const weights = reinterpret_cast<T*>(s.weights.data() + i * blocks.value_units);
      const F32 most = broadcast(s.most[i]);
      F32 total = {};
      for (int64_t c = 0; c < size; c += kLanes) {
        const F32 weight = exp(load<F32>(scores + c) - most);
        total += weight;
        store_f32(weights + c, weight);
      }
      s.total[i] = s.total[i] * s.scale[i] + sum_lanes(total);
      if (s.scale[i] != 1.0f) {
        float* const output = s.output.data() + i * width;
        for (int64_t d = 0; d < width; d += kLanes) store(output + d, load<F32>(output + d) * s.scale[i]);
      }
    }
    // Positions that no row sees are left out: a block may still hold numbers of its earlier owner.
    const int64_t units = (std::min(size, last + 1 - start) + Dot::kDepth - 1) / Dot::kDepth;
    for (int h = 0; h < heads; ++h)
      product_rows<Dot, true>(w + h * rows, rows, blocks.value_panel(block, first_head + h), width, units,
                              s.output.data() + h * rows * width);
  }

  for (int i = 0; i < all; ++i) {
    T* const to = place(out, i);
    const F32 inverse = broadcast(1.0f / s.total[i]);
    for (int64_t d = 0; d < out.head_dim; d += kLanes)
      store_f32(to + d, load<F32>(s.output.data() + i * width + d) * inverse, out.head_dim - d);
  }
}

// The work on one sequence: its tiles of rows, times its key-value heads, so many heads together.
struct Work {
  int64_t first_task, tiles, heads, parts;  // parts: of all heads
};

// The tasks of all sequences, with `most_heads` heads together at most.
struct Division {
  int64_t tasks = 0, cost = 0, longest = 0;  // cost in products of a row with a position, of all tasks and of the longest

  // Whether threads that take the tasks as they come would end at about the same time.
  bool is_even(int threads) const {
    return tasks >= kManyTasks * threads || (tasks % threads == 0 && longest * threads <= cost);
  }
};

Division divide(const Step& step, int64_t kv_heads, int64_t group, int64_t most_heads, std::vector<Work>& work) {
  Division all;
  work.clear();
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t rows = (step.query_start[s + 1] - step.query_start[s]) * group;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t most_rows = tiles ? (rows + tiles - 1) / tiles : 1;  // of a tile
    const int64_t heads = std::clamp<int64_t>(kTaskRows / most_rows, 1, most_heads);
    const int64_t parts = (kv_heads + heads - 1) / heads;
    work.push_back({all.tasks, tiles, heads, parts});
    all.tasks += tiles * parts;
    all.cost += rows * kv_heads * step.context_len[s];
    all.longest = std::max(all.longest, most_rows * heads * step.context_len[s]);
  }
  return all;
}

template <class Dot, class T = typename Dot::Value>
void run(const Cache& cache, const Step& step, const Blocks<Dot>& blocks, int64_t heads, const Tokens<const T>& query,
         const Tokens<const T>& key, const Tokens<const T>& value, const Tokens<T>& out, float scale, int threads) {
  const int64_t group = heads / cache.kv_heads;
  static thread_local std::vector<Work> kept;
  std::vector<Work>& work = kept;  // of this thread, also in the others
  int64_t most_heads = cache.kv_heads;
  Division all = divide(step, cache.kv_heads, group, most_heads, work);
  while (!all.is_even(threads) && most_heads > 1)
    all = divide(step, cache.kv_heads, group, most_heads = (most_heads + 1) / 2, work);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < step.sequences * cache.kv_heads; ++item) {
      const int64_t s = item / cache.kv_heads, head = item % cache.kv_heads;
      for (int64_t t = step.query_start[s]; t < step.query_start[s + 1]; ++t)
        write<Dot>(blocks, step.slots[t], head, cache.head_dim, key.at(t, head), value.at(t, head));
    }
    // The threads meet here: a query may see keys that another thread has written.
    AttentionScratch scratch(blocks.block_size, blocks.value_dim);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < all.tasks; ++task) {
      const auto after = [](int64_t t, const Work& w) { return t < w.first_task; };
      const int64_t s = std::upper_bound(work.begin(), work.end(), task, after) - work.begin() - 1;
      const Work& w = work[s];
      const int64_t token = step.query_start[s], tokens = step.query_start[s + 1] - token;
      const int64_t part = (task - w.first_task) % w.parts, first_head = part * w.heads;
      // The tiles at the end of a prompt see most and come first, so that no long task begins last.
      const int64_t tile = w.tiles - 1 - (task - w.first_task) / w.parts;
      const int64_t first = tokens * group * tile / w.tiles, end = tokens * group * (tile + 1) / w.tiles;
      attend<Dot>(blocks, step.block_table + s * step.table_width, first_head,
                  int(std::min(w.heads, cache.kv_heads - first_head)), group, query, out, token,
                  step.context_len[s] - tokens, first, int(end - first), scale, scratch);
    }
  }
}

}  // namespace

// Query, key and value are [tokens, heads, head_dim] with a stride between tokens, out is contiguous.
extern "C" void paged_attention(const Cache* cache, const Step* step, void* keys, void* values, int64_t heads,
                                const void* query, int64_t query_stride, const void* key, int64_t key_stride,
                                const void* value, int64_t value_stride, void* out, float scale, int threads) {
  const auto go = [&](auto dot) {
    using Dot = decltype(dot);
    using T = typename Dot::Value;
    const int64_t d = cache->head_dim;
    run<Dot>(*cache, *step, Blocks<Dot>(*cache, keys, values), heads, Tokens<const T>{(const T*)query, query_stride, d},
             Tokens<const T>{(const T*)key, key_stride, d}, Tokens<const T>{(const T*)value, value_stride, d},
             Tokens<T>{(T*)out, heads * d, d}, scale, threads);
  };
  if (cache->is_bf16)
    go(BFloat16());
  else
    go(Float32());
}
