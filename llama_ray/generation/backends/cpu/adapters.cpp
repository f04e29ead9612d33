// The low-rank adapters of a step: to the rows of an adapter, the product of x with its A and its B is added (Hu et al. 2021,
// arXiv:2106.09685). Rows of one adapter form a segment, so that its matrices are read once for up to kMostRows rows (Chen et
// al. 2023, Punica, arXiv:2310.18547). Every element is summed in one order, in fp32, and rounded once: a row's result does
// not depend on the other rows or on their adapters.
#include <algorithm>
#include <vector>

#include "abi.h"
#include "product.h"

namespace {

constexpr int kAdapterPanel = 64;  // outputs of B that are stored together; adapters.py packs them

// Fewer multiplications are not worth a second thread.
constexpr int64_t kMultiplicationsWorthThreads = 1 << 17;

// Up to kMostRows rows of one segment.
struct AdapterTile {
  const AdapterProduct* product;
  const int64_t* rows;
  int count;
  int64_t inner;  // where the tile's products with A begin
};

int64_t panels_of(const AdapterPart& part) { return (part.out_features + kAdapterPanel - 1) / kAdapterPanel; }

// rows x A -> inner [count, columns].
template <class Dot>
void multiply_a(const AdapterTile& tile, const typename Dot::Value* x, float* inner) {
  const AdapterProduct& p = *tile.product;
  const uint32_t* row[kMostRows];
  for (int r = 0; r < tile.count; ++r) row[r] = reinterpret_cast<const uint32_t*>(x + tile.rows[r] * p.in_features);
  with_rows(tile.count, [&](auto n) {
    product<Dot, false, decltype(n)::value>(row, static_cast<const uint32_t*>(p.a), p.columns,
                                            p.in_features / Dot::kDepth, inner + tile.inner, p.columns);
  });
}

// Adds scale * (inner x B) to one panel of outputs.
template <class T, int ROWS>
void add_panel(const AdapterTile& tile, const AdapterPart& part, int64_t panel, const float* inner, T* y, int64_t width) {
  const T* columns = static_cast<const T*>(part.b) + panel * part.rank * kAdapterPanel;
  const int64_t first = panel * kAdapterPanel;
  for (int64_t c = 0; c < kAdapterPanel && first + c < part.out_features; c += kMostVectors * kLanes) {
    F32 sum[ROWS][kMostVectors] = {};
    for (int64_t j = 0; j < part.rank; ++j) {
      F32 column[kMostVectors];
      for (int v = 0; v < kMostVectors; ++v) column[v] = load_f32(columns + j * kAdapterPanel + c + v * kLanes);
      for (int r = 0; r < ROWS; ++r) {
        const F32 h = broadcast(inner[tile.inner + r * tile.product->columns + part.first_column + j]);
        for (int v = 0; v < kMostVectors; ++v) sum[r][v] = fma(h, column[v], sum[r][v]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < kMostVectors; ++v) {
        const int64_t at = first + c + v * kLanes, left = part.out_features - at;
        if (left <= 0) break;
        T* const to = y + tile.rows[r] * width + part.first_output + at;
        store_f32(to, fma(sum[r][v], broadcast(part.scale), load_f32(to, left)), left);
      }
  }
}

template <class T>
void add_outputs(const AdapterTile& tile, int64_t panel, const float* inner, T* y, int64_t width) {
  for (int64_t i = 0; i < tile.product->num_parts; ++i) {
    const AdapterPart& part = tile.product->parts[i];
    if (panel < panels_of(part))
      return with_rows(tile.count, [&](auto n) {
        add_panel<T, decltype(n)::value>(tile, part, panel, inner, y, width);
      });
    panel -= panels_of(part);
  }
}

template <class Dot>
void add_products(const AdapterStep& step, int64_t product, const typename Dot::Value* x, typename Dot::Value* y,
                  int64_t width, int threads) {
  static thread_local std::vector<AdapterTile> tile_memory;
  static thread_local std::vector<float> inner_memory;
  tile_memory.clear();
  int64_t columns = 0, panels = 0, multiplications = 0;
  for (int64_t s = 0; s < step.segments; ++s) {
    const AdapterProduct& p = step.adapters[s][product];
    int64_t own = 0;
    for (int64_t i = 0; i < p.num_parts; ++i) own += panels_of(p.parts[i]);
    if (!own) continue;
    panels = std::max(panels, own);
    for (int64_t first = step.segment_start[s]; first < step.segment_start[s + 1]; first += kMostRows) {
      const int count = int(std::min<int64_t>(kMostRows, step.segment_start[s + 1] - first));
      tile_memory.push_back({&p, step.rows + first, count, columns});
      columns += count * p.columns;
      multiplications += count * p.columns * (p.in_features + own * kAdapterPanel);
    }
  }
  if (inner_memory.size() < size_t(columns)) inner_memory.resize(columns);
  // Threads of the parallel region have their own thread-local vectors.
  const AdapterTile* const tiles = tile_memory.data();
  float* const inner = inner_memory.data();
  const int64_t count = tile_memory.size();
#pragma omp parallel num_threads(threads) if (threads > 1 && multiplications >= kMultiplicationsWorthThreads)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) multiply_a<Dot>(tiles[t], x, inner);
#pragma omp for schedule(static) nowait
    for (int64_t item = 0; item < count * panels; ++item)
      add_outputs(tiles[item / panels], item % panels, inner, y, width);
  }
}

template <class T>
void silu_product_rows(const T* gate_up, T* y, int64_t rows, int64_t size, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * size >= 16384)
  for (int64_t r = 0; r < rows; ++r) {
    const T *gates = gate_up + 2 * r * size, *ups = gates + size;
    for (int64_t i = 0; i < size; i += kLanes) {
      const F32 gate = load_f32(gates + i, size - i);
      const F32 silu = rounded<T>(gate / (1.0f + exp(-gate)));
      store_f32(y + r * size + i, silu * load_f32(ups + i, size - i), size - i);
    }
  }
}

}  // namespace

extern "C" void add_adapters(const AdapterStep* step, int64_t product, int is_bf16, const void* x, void* y,
                             int64_t width, int threads) {
  if (is_bf16)
    add_products<BFloat16>(*step, product, (const bf16*)x, (bf16*)y, width, threads);
  else
    add_products<Float32>(*step, product, (const float*)x, (float*)y, width, threads);
}

extern "C" void silu_product(int is_bf16, const void* gate_up, void* y, int64_t rows, int64_t size, int threads) {
  if (is_bf16)
    silu_product_rows((const bf16*)gate_up, (bf16*)y, rows, size, threads);
  else
    silu_product_rows((const float*)gate_up, (float*)y, rows, size, threads);
}
