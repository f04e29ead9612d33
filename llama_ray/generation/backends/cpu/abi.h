// The structures and functions that Python and the kernels share; abi.py declares the same ones.
#pragma once

#include <cstdint>

extern "C" {

// The paged cache of a model; attention.cpp describes the layout of a block.
struct Cache {
  int64_t kv_heads, head_dim, block_size;
  int64_t block_stride;  // bytes from one block to the next
  int32_t is_bf16;
};

// The sequences and tokens of one step, as in StepBatch.
struct Step {
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* context_len;  // [sequences]
  const int32_t* block_table;  // [sequences, table_width]
  const int64_t* slots;        // [tokens]
  int64_t sequences, table_width;
};

// A packed weight matrix; linear.py packs it.
struct Linear {
  const uint8_t* weight;
  const void* scales;           // int8: fp32 [panels * 64]; int4: bf16 [panels, groups, 64]
  int64_t in_features;          // even for bfloat16
  int64_t out_features;         // columns of the result
  int32_t format;               // of the weights: a Format of linear.cpp
  int32_t x_is_bf16, y_is_bf16;
  int32_t is_gated;             // the result is silu(gate) * up
};

// The layers of one transformer block.
struct Block {
  const Linear *qkv, *o, *gate_up, *down;
  const void *input_norm, *post_attention_norm;
  int64_t hidden_size, heads, kv_heads, head_dim, intermediate_size;
  float eps;
  int32_t is_bf16;
};

// One adapted matrix of a product, such as that of the queries: B [rank, outputs] in panels of 64 outputs.
struct AdapterPart {
  const void* b;                // [panels, rank, 64]
  int64_t first_column;         // of the columns of A
  int64_t rank;
  int64_t first_output, out_features;
  float scale;
};

// What an adapter adds to one product of a block; without parts, nothing.
struct AdapterProduct {
  const void* a;                // [in_features / values in a unit, columns] in units of 32 bits, the A of all parts
  int64_t in_features;          // even for bfloat16
  int64_t columns;              // a multiple of the lanes of a vector
  const AdapterPart* parts;
  int64_t num_parts;
};

// The adapters of a step: segment s has the rows from rows[segment_start[s]] up to rows[segment_start[s + 1]].
struct AdapterStep {
  const int64_t* rows;
  const int64_t* segment_start;            // [segments + 1]
  const AdapterProduct* const* adapters;   // [segments]: the products of all blocks, 4 each: qkv, o, gate_up, down
  int64_t segments;
};

// The SamplingTensors of the rows to draw from; without a comment: [rows].
struct DrawArguments {
  int64_t width;                 // candidates per row; 0: the whole vocabulary, without top-k and top-p
  int32_t may_be_short;          // whether `width` candidates may be fewer than the nucleus of top-p
  const float* temperature;
  const uint8_t* outside_top_k;  // [rows, width]
  const uint8_t* no_top_k;
  const double* top_p;
  const float* log_min_p;        // null if no row has one
  const uint64_t* noise_keys;
};

// x [rows, in_features] -> y [rows, out_features].
void linear(const Linear* layer, const void* x, int64_t rows, void* y, int threads);

// The same for a gated layer without its activation: y [rows, 2 * out_features], gates before ups.
void linear_apart(const Linear* layer, const void* x, int64_t rows, void* y, int threads);

// gate_up [rows, 2 * size] -> y [rows, size]: silu(gate) * up, rounded as by a gated layer.
void silu_product(int is_bf16, const void* gate_up, void* y, int64_t rows, int64_t size, int threads);

// Adds to y [rows, width] what the adapters of a step add to a product of x, which is number `product` of all blocks.
void add_adapters(const AdapterStep* step, int64_t product, int is_bf16, const void* x, void* y, int64_t width,
                  int threads);

// x and y [rows, size].
void rms_norm(int is_bf16, const void* x, const void* weight, void* y, int64_t rows, int64_t size, float eps, int threads);

// Rotates the first `heads` heads of each row of x, in place; `stride` is the number of values from one row to the next.
// cos and sin [positions, head_dim / 2]: row r has position r % positions.
void rope(int is_bf16, void* x, int64_t stride, int64_t rows, int64_t heads, int64_t head_dim, const float* cos,
          const float* sin, int64_t positions, int threads);

// Attention of one layer, whose keys and values in block 0 begin at `keys` and `values`. query, key and value are
// [tokens, heads, head_dim] with a stride, in values, from one token to the next; out is contiguous.
void paged_attention(const Cache* cache, const Step* step, void* keys, void* values, int64_t heads, const void* query,
                     int64_t query_stride, const void* key, int64_t key_stride, const void* value, int64_t value_stride,
                     void* out, float scale, int threads);

// All blocks of a model: x [rows, hidden_size] -> out, which must not overlap x. `keys` and `values` hold a pointer for
// each layer; cos, sin and positions are as in rope. `adapters` is null for a step without any.
void blocks(const Block* const* all, int64_t count, const Cache* cache, const Step* step, void* const* keys,
            void* const* values, const void* x, void* out, int64_t rows, const float* cos, const float* sin,
            int64_t positions, float scale, const AdapterStep* adapters, int threads);

// logits [rows, size] -> the `width` <= size largest of each row: values and ids [rows, width].
void top_candidates(const float* logits, int64_t rows, int64_t size, int64_t width, float* values, int64_t* ids,
                    int threads);

// logits [_, size] -> tokens [rows]; `selected` holds the row numbers to draw from, null for all. are_short [rows] says
// which rows must be drawn again from more candidates; null if `width` is 0.
void draw(const float* logits, const int64_t* selected, int64_t rows, int64_t size, const DrawArguments* arguments,
          int64_t* tokens, uint8_t* are_short, int threads);

// One line for each structure: "NAME SIZE", then " FIELD OFFSET SIZE" for each field.
const char* struct_layouts();

}  // extern "C"
