// The cache of keys and values, in blocks of 16 tokens, and attention over it.
//
// A block holds, for each layer and key-value head, what one pass over 16 keys reads, in the order in which it is read:
//   keys    [head_dim / 2][16 tokens][2]      16 scores come out of one accumulator, without a horizontal sum
//   values  [8 pairs of tokens][head_dim][2]  16 outputs likewise
// as bfloat16, or as int8 followed by the tokens' float scales for keys [16] and values [16]. Both orders are also
// those of the tile unit's right-hand operand.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nio {

constexpr int kBlock = 16;  // tokens

struct CacheShape {
  int kv_heads, head_dim;
  bool int8;

  size_t head_bytes() const {
    const size_t numbers = static_cast<size_t>(kBlock) * head_dim * 2;
    return int8 ? numbers + 2 * kBlock * sizeof(float) : numbers * 2;
  }
  size_t block_bytes() const { return head_bytes() * kv_heads; }
};

// Stores one token's keys and values [kv_heads][head_dim] at slot = block * 16 + offset of a layer's cache.
void store_token(const CacheShape& shape, uint8_t* layer, int slot, const float* keys, const float* values);

// What the queries of one sequence look at.
struct Context {
  const uint8_t* layer;
  const int32_t* blocks;
  int first_position;  // of the first query; the i-th sees keys 0 .. first_position + i
};

constexpr int kQueryRows = 64;  // queries times heads that one task takes on

// Attention of `rows` (at most kQueryRows) rows of one sequence and key-value head, as in FlashAttention (Dao 2022):
// keys and values pass once, with a running maximum. Row r is query r / group and head r % group of the head's group;
// `queries` and `out` point at the first query's first head and have a stride (in floats) per query.
void attend(const CacheShape& shape, const Context& context, int head, int group, int first_row, int rows,
            const float* queries, size_t query_stride, float* out, size_t out_stride);

}  // namespace nio
