// The layouts of the shared structures, as this library was compiled; a test compares them with those of abi.py.
#include "abi.h"

#include <cstddef>
#include <string>

namespace {

struct Layout {
  std::string text;

  void add(const char* name, size_t size) {
    text += std::string(text.empty() ? "" : "\n") + name + " " + std::to_string(size);
  }
  void add(const char* name, size_t offset, size_t size) {
    text += std::string(" ") + name + " " + std::to_string(offset) + " " + std::to_string(size);
  }
};

#define FIELD(name) layout.add(#name, offsetof(Described, name), sizeof(Described::name))

std::string describe() {
  Layout layout;
  {
    using Described = Cache;
    layout.add("Cache", sizeof(Described));
    FIELD(kv_heads), FIELD(head_dim), FIELD(block_size), FIELD(block_stride), FIELD(is_bf16);
  }
  {
    using Described = Step;
    layout.add("Step", sizeof(Described));
    FIELD(query_start), FIELD(context_len), FIELD(block_table), FIELD(slots), FIELD(sequences), FIELD(table_width);
  }
  {
    using Described = Linear;
    layout.add("Linear", sizeof(Described));
    FIELD(weight), FIELD(scales), FIELD(in_features), FIELD(out_features), FIELD(format), FIELD(x_is_bf16);
    FIELD(y_is_bf16), FIELD(is_gated);
  }
  {
    using Described = Block;
    layout.add("Block", sizeof(Described));
    FIELD(qkv), FIELD(o), FIELD(gate_up), FIELD(down), FIELD(input_norm), FIELD(post_attention_norm);
    FIELD(hidden_size), FIELD(heads), FIELD(kv_heads), FIELD(head_dim), FIELD(intermediate_size), FIELD(eps);
    FIELD(is_bf16);
  }
  {
    using Described = AdapterPart;
    layout.add("AdapterPart", sizeof(Described));
    FIELD(b), FIELD(first_column), FIELD(rank), FIELD(first_output), FIELD(out_features), FIELD(scale);
  }
  {
    using Described = AdapterProduct;
    layout.add("AdapterProduct", sizeof(Described));
    FIELD(a), FIELD(in_features), FIELD(columns), FIELD(parts), FIELD(num_parts);
  }
  {
    using Described = AdapterStep;
    layout.add("AdapterStep", sizeof(Described));
    FIELD(rows), FIELD(segment_start), FIELD(adapters), FIELD(segments);
  }
  {
    using Described = DrawArguments;
    layout.add("DrawArguments", sizeof(Described));
    FIELD(width), FIELD(may_be_short), FIELD(temperature), FIELD(outside_top_k), FIELD(no_top_k), FIELD(top_p);
    FIELD(log_min_p), FIELD(noise_keys);
  }
  return layout.text;
}

#undef FIELD

}  // namespace

extern "C" const char* struct_layouts() {
  static const std::string text = describe();
  return text.c_str();
}
