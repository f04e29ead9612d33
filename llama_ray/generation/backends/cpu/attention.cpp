// Attention over a paged cache: writes the keys and values of a step into their blocks, then attends causally to the whole
// context of each query. One call computes one layer.
//
// For one key-value head a block holds `block_size` positions as two panels (product.h): keys [head_dim units, block_size
// columns] and values [block_size units, value_dim columns], where value_dim is head_dim rounded up to 16. Scores and
// outputs are therefore both products of rows with a panel.
//
// The softmax is online (Milakov and Gimelshein 2018, arXiv:1805.02867) and takes one block at a time, in order of position.
// Blocks begin at multiples of block_size, so what a query computes in a block depends on its position alone: its result
// depends neither on how the prompt was cut into chunks nor on the other sequences of the step.
#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "abi.h"
#include "product.h"

namespace {

// Query rows of one head that share each block while it is in the first-level cache. More rows use a block better; fewer
// leave work for all threads.
constexpr int kTileRows = 24;
// Query rows of one task. If a tile has fewer, as in decoding, the task takes several heads: their panels are adjacent, and
// memory is read several times as fast in runs of 48 KiB as in runs of 4 KiB.
constexpr int kTaskRows = 32;
// With this many tasks for each thread, all threads finish at about the same time even if tasks differ in size.
constexpr int kManyTasks = 4;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

static_assert(kTileRows <= kTaskRows && kTaskRows % kLanes == 0);

// The cache of one layer, in units of 32 bits.
template <class Dot>
struct LayerCache {
  int64_t kv_heads, block_size, stride, value_dim, key_units, value_units;
  uint32_t *keys, *values;  // in block 0

  LayerCache(const Cache& c, void* keys, void* values)
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

// A tensor [tokens, heads, head_dim]; `stride` is the number of values from one token to the next.
template <class T>
struct Tokens {
  T* first;
  int64_t stride;
  int64_t head_dim;
  T* at(int64_t token, int64_t head) const { return first + token * stride + head * head_dim; }
};

// What all tasks of a call share.
template <class Dot>
struct Layer {
  using T = typename Dot::Value;
  LayerCache<Dot> cache;
  Tokens<const T> query, key, value;
  Tokens<T> out;
  int64_t group;  // query heads for each key-value head
  float scale;
};

// The rows of one task: `rows` rows of one sequence, for each of `heads` key-value heads. Row r of a sequence is query head
// r % group of the token r / group.
struct Tile {
  const int32_t* block_table;  // of the sequence
  int64_t first_token;         // of the sequence, in the step
  int64_t first_position;      // of that token
  int64_t first_head, first_row;
  int heads, rows;

  int count() const { return heads * rows; }
  // Rows of one head follow each other, then come those of the next head.
  int64_t row(int i) const { return first_row + i % rows; }
  int64_t position(int i, int64_t group) const { return first_position + row(i) / group; }
  template <class T>
  T* at(const Tokens<T>& tokens, int i, int64_t group) const {
    return tokens.at(first_token + row(i) / group, (first_head + i / rows) * group + row(i) % group);
  }
};

// The memory of one thread for its current tile.
struct AttentionScratch {
  const uint32_t *query_rows[kTaskRows], *weight_rows[kTaskRows];
  std::vector<float> scores, output;  // [kTaskRows, block_size], [kTaskRows, value_dim]
  std::vector<uint32_t> weights;      // [kTaskRows, units of a block]
  alignas(64) float maximum[kTaskRows], total[kTaskRows];  // of all scores and weights so far
  alignas(64) float shrink[kTaskRows];  // what earlier sums are multiplied by when the maximum has grown

  AttentionScratch(int64_t block_size, int64_t value_dim)
      : scores(kTaskRows * block_size), output(kTaskRows * value_dim), weights(kTaskRows * block_size) {}
};

template <class Dot, class T = typename Dot::Value>
void write_token(const LayerCache<Dot>& cache, int64_t slot, int64_t head, int64_t head_dim, const T* key, const T* value) {
  const int64_t block = slot / cache.block_size, offset = slot % cache.block_size;
  uint32_t* key_unit = cache.key_panel(block, head) + offset;
  for (int64_t u = 0; u < cache.key_units; ++u, key_unit += cache.block_size)
    std::memcpy(key_unit, key + u * Dot::kDepth, 4);
  uint32_t* unit = cache.value_panel(block, head) + offset / Dot::kDepth * cache.value_dim;
  for (int64_t d = 0; d < head_dim; ++d) {
    if constexpr (Dot::kDepth == 1)
      std::memcpy(unit + d, value + d, 4);
    else if (offset % 2)
      unit[d] = (unit[d] & 0xffffu) | uint32_t(value[d].bits) << 16;
    else
      unit[d] = value[d].bits;  // The next position becomes 0: the block's previous owner may have left NaN there.
  }
}

// The product of up to kTileRows rows with a panel, at most kMostRows rows at a time.
template <class Dot, bool ADD>
__attribute__((always_inline)) inline void product_rows(const uint32_t* const* rows, int count, const uint32_t* panel, int64_t columns, int64_t units,
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

template <class Dot>
void begin_tile(const Layer<Dot>& layer, const Tile& tile, AttentionScratch& s) {
  for (int i = 0; i < tile.count(); ++i) {
    s.query_rows[i] = reinterpret_cast<const uint32_t*>(tile.at(layer.query, i, layer.group));
    s.weight_rows[i] = s.weights.data() + i * layer.cache.value_units;
  }
  std::fill_n(s.maximum, kTaskRows, kMinusInfinity);
  std::fill_n(s.total, kTaskRows, 0.0f);
  std::fill_n(s.output.data(), tile.count() * layer.cache.value_dim, 0.0f);
}

// score_block and weigh_block are not inlined, product_rows is: as one large function, decoding takes about 5% longer.

// The scores of a block whose first position is `start`, -inf beyond each row's own position; updates the maxima.
template <class Dot>
__attribute__((noinline)) void score_block(const Layer<Dot>& layer, const Tile& tile, int64_t block, int64_t start, AttentionScratch& s) {
  const int64_t size = layer.cache.block_size, group = layer.group;
  const int all = tile.count(), rows = tile.rows;
  const float scale = layer.scale;
  for (int h = 0; h < tile.heads; ++h)
    product_rows<Dot, false>(s.query_rows + h * rows, rows, layer.cache.key_panel(block, tile.first_head + h), size,
                             layer.cache.key_units, s.scores.data() + h * rows * size);
  for (int i = 0; i < all; ++i) {
    const int64_t visible = tile.position(i, group) + 1 - start;
    float* const scores = s.scores.data() + i * size;
    F32 maximum = broadcast(s.maximum[i]);
    for (int64_t c = 0; c < size; c += kLanes) {
      F32 score = load<F32>(scores + c) * scale;
      if (visible < c + kLanes)
        score = lane_index() < broadcast(int32_t(visible - c)) ? score : broadcast(kMinusInfinity);
      store(scores + c, score);
      maximum = max(score, maximum);
    }
    s.shrink[i] = s.maximum[i];
    s.maximum[i] = max_lanes(maximum);
  }
  // Rows beyond the last hold -inf and give NaN, which is never read.
  for (int i = 0; i < all; i += kLanes)
    store(s.shrink + i, exp(load<F32>(s.shrink + i) - load<F32>(s.maximum + i)));
}

// Scores -> softmax weights that are not divided by their sum yet; earlier sums shrink to the new maximum.
template <class Dot>
__attribute__((noinline)) void weigh_block(const Layer<Dot>& layer, const Tile& tile, AttentionScratch& s) {
  using T = typename Dot::Value;
  const int64_t size = layer.cache.block_size, width = layer.cache.value_dim, units = layer.cache.value_units;
  const int all = tile.count();
  for (int i = 0; i < all; ++i) {
    const float* const scores = s.scores.data() + i * size;
    T* const weights = reinterpret_cast<T*>(s.weights.data() + i * units);
    const F32 maximum = broadcast(s.maximum[i]);
    F32 total = {};
    for (int64_t c = 0; c < size; c += kLanes) {
      const F32 weight = exp(load<F32>(scores + c) - maximum);
      total += weight;
      store_f32(weights + c, weight);
    }
    s.total[i] = s.total[i] * s.shrink[i] + sum_lanes(total);
    if (s.shrink[i] != 1.0f) {
      float* const output = s.output.data() + i * width;
      for (int64_t d = 0; d < width; d += kLanes) store(output + d, load<F32>(output + d) * s.shrink[i]);
    }
  }
}

template <class Dot>
void end_tile(const Layer<Dot>& layer, const Tile& tile, AttentionScratch& s) {
  const int64_t width = layer.cache.value_dim, head_dim = layer.out.head_dim;
  for (int i = 0; i < tile.count(); ++i) {
    auto* const out = tile.at(layer.out, i, layer.group);
    const F32 inverse = broadcast(1.0f / s.total[i]);
    for (int64_t d = 0; d < head_dim; d += kLanes)
      store_f32(out + d, load<F32>(s.output.data() + i * width + d) * inverse, head_dim - d);
  }
}

template <class Dot>
void attend(const Layer<Dot>& layer, const Tile& tile, AttentionScratch& s) {
  const LayerCache<Dot>& cache = layer.cache;
  const int64_t size = cache.block_size, last = tile.position(tile.rows - 1, layer.group);
  const int rows = tile.rows;
  begin_tile(layer, tile, s);
  for (int64_t start = 0; start <= last; start += size) {
    const int64_t block = tile.block_table[start / size];
    score_block(layer, tile, block, start, s);
    weigh_block(layer, tile, s);
    // Positions that no row sees are left out: the block may still hold numbers of its previous owner.
    const int64_t units = (std::min(size, last + 1 - start) + Dot::kDepth - 1) / Dot::kDepth;
    for (int h = 0; h < tile.heads; ++h)
      product_rows<Dot, true>(s.weight_rows + h * rows, rows, cache.value_panel(block, tile.first_head + h),
                              cache.value_dim, units, s.output.data() + h * rows * cache.value_dim);
  }
  end_tile(layer, tile, s);
}

// The tasks of one sequence: `tiles` tiles of rows, times `parts` parts of at most `heads` key-value heads.
struct SequenceTasks {
  int64_t first_task, tiles, heads, parts;
};

// All tasks of a step. Costs are counted in products of a row with a position.
struct Schedule {
  int64_t tasks = 0, cost = 0, longest = 0;  // longest: the cost of the most expensive task

  // Whether threads that take the tasks in turn finish at about the same time.
  bool is_even(int threads) const {
    return tasks >= kManyTasks * threads || (tasks % threads == 0 && longest * threads <= cost);
  }
};

// Divide a step into tasks of at most `most_heads` key-value heads each.
Schedule divide(const Step& step, int64_t kv_heads, int64_t group, int64_t most_heads, std::vector<SequenceTasks>& tasks) {
  Schedule all;
  tasks.clear();
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t rows = (step.query_start[s + 1] - step.query_start[s]) * group;
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    const int64_t tile_rows = tiles ? (rows + tiles - 1) / tiles : 1;  // of the largest tile
    const int64_t heads = std::clamp<int64_t>(kTaskRows / tile_rows, 1, most_heads);
    const int64_t parts = (kv_heads + heads - 1) / heads;
    tasks.push_back({all.tasks, tiles, heads, parts});
    all.tasks += tiles * parts;
    all.cost += rows * kv_heads * step.context_len[s];
    all.longest = std::max(all.longest, tile_rows * heads * step.context_len[s]);
  }
  return all;
}

Tile tile_of(int64_t task, const std::vector<SequenceTasks>& tasks, const Step& step, int64_t kv_heads, int64_t group) {
  const auto begins_after = [](int64_t t, const SequenceTasks& w) { return t < w.first_task; };
  const int64_t s = std::upper_bound(tasks.begin(), tasks.end(), task, begins_after) - tasks.begin() - 1;
  const SequenceTasks& sequence = tasks[s];
  const int64_t token = step.query_start[s], tokens = step.query_start[s + 1] - token;
  const int64_t index = task - sequence.first_task;
  const int64_t first_head = index % sequence.parts * sequence.heads;
  // The tiles at the end of a prompt have the longest contexts and come first, so that no long task begins last.
  const int64_t tile = sequence.tiles - 1 - index / sequence.parts;
  const int64_t first_row = tokens * group * tile / sequence.tiles;
  const int64_t end_row = tokens * group * (tile + 1) / sequence.tiles;
  return {step.block_table + s * step.table_width,
          token,
          step.context_len[s] - tokens,
          first_head,
          first_row,
          int(std::min(sequence.heads, kv_heads - first_head)),
          int(end_row - first_row)};
}

template <class Dot>
void run(const Step& step, const Layer<Dot>& layer, int threads) {
  const LayerCache<Dot>& cache = layer.cache;
  const int64_t kv_heads = cache.kv_heads, group = layer.group, head_dim = layer.key.head_dim;
  static thread_local std::vector<SequenceTasks> kept;
  std::vector<SequenceTasks>& tasks = kept;  // of the calling thread; the other threads read it too
  int64_t most_heads = kv_heads;
  Schedule schedule = divide(step, kv_heads, group, most_heads, tasks);
  while (!schedule.is_even(threads) && most_heads > 1)
    schedule = divide(step, kv_heads, group, most_heads = (most_heads + 1) / 2, tasks);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t item = 0; item < step.sequences * kv_heads; ++item) {
      const int64_t s = item / kv_heads, head = item % kv_heads;
      for (int64_t t = step.query_start[s]; t < step.query_start[s + 1]; ++t)
        write_token<Dot>(cache, step.slots[t], head, head_dim, layer.key.at(t, head), layer.value.at(t, head));
    }
    // The threads meet here: a query may need keys that another thread has written.
    AttentionScratch scratch(cache.block_size, cache.value_dim);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < schedule.tasks; ++task)
      attend(layer, tile_of(task, tasks, step, kv_heads, group), scratch);
  }
}

}  // namespace

extern "C" void paged_attention(const Cache* cache, const Step* step, void* keys, void* values, int64_t heads,
                                const void* query, int64_t query_stride, const void* key, int64_t key_stride,
                                const void* value, int64_t value_stride, void* out, float scale, int threads) {
  const auto run_as = [&](auto dot) {
    using Dot = decltype(dot);
    using T = typename Dot::Value;
    const int64_t d = cache->head_dim;
    const Layer<Dot> layer{LayerCache<Dot>(*cache, keys, values),
                           {(const T*)query, query_stride, d},
                           {(const T*)key, key_stride, d},
                           {(const T*)value, value_stride, d},
                           {(T*)out, heads * d, d},
                           heads / cache->kv_heads,
                           scale};
    run(*step, layer, threads);
  };
  if (cache->is_bf16)
    run_as(BFloat16());
  else
    run_as(Float32());
}
