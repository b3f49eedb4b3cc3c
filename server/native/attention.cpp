#include "attention.h"

#include <algorithm>
#include <cmath>

#include "simd.h"
#include "tile.h"

namespace nio {
namespace {

constexpr int kSpan = 8;  // blocks that one round of the running maximum covers
constexpr int kSpanKeys = kSpan * kBlock;
constexpr int kMostHeadDim = 256;
constexpr int kVectorRows = 8;    // beyond, the tile unit is faster
constexpr float kNever = -1e30f;  // a maximum before any key was seen; -inf would make inf - inf

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename Number>
void scatter(Number* keys, Number* values, int head_dim, int offset, const Number* key, const Number* value) {
  for (int d = 0; d < head_dim; ++d) {
    keys[(d / 2 * kBlock + offset) * 2 + d % 2] = key[d];
    values[(offset / 2 * head_dim + d) * 2 + offset % 2] = value[d];
  }
}

float to_int8(const float* from, int count, int8_t* to) {
  __m512 most = _mm512_setzero_ps();
  for (int i = 0; i < count; i += kLanes)
    most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), from + i)));
  const float scale = std::max(_mm512_reduce_max_ps(most) / 127.0f, 1e-12f);
  const __m512 inverse = _mm512_set1_ps(1.0f / scale);
  for (int i = 0; i < count; i += kLanes) {
    const __mmask16 mask = first_lanes(count - i);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, from + i), inverse));
    _mm_mask_storeu_epi8(to + i, mask, _mm512_cvtsepi32_epi8(q));
  }
  return scale;
}

// int8 numbers as bfloat16, in which they are exact; the scales are applied to scores and weights instead.
void widen(const int8_t* from, int count, uint16_t* to) {
  for (int i = 0; i < count; i += kLanes) {
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), to_bf16(_mm512_cvtepi32_ps(wide)));
  }
}

// One span of keys and values as bfloat16, wherever they come from.
struct Span {
  const uint16_t *keys[kSpan], *values[kSpan];
  const float *key_scales[kSpan], *value_scales[kSpan];  // null: none
  int blocks;
};

// Attention of some rows to all their keys, with what the vector and the tile version share.
class Attention {
 public:
  Attention(const CacheShape& shape, const Context& context, int head, int group, int first_row, int rows)
      : shape_(shape), context_(context), head_(head), group_(group), first_row_(first_row), rows_(rows) {
    last_key_ = visible(rows - 1);
    std::fill_n(most_, rows, kNever);
    std::fill_n(total_, rows, 0.0f);
    std::memset(sums_, 0, sizeof(float) * rows * shape.head_dim);
  }

  void run(const float* queries, size_t query_stride, float* out, size_t out_stride) {
    load_queries(queries, query_stride);
    const bool tiled = use_tiles();
    for (int first = 0; first < last_key_; first += kSpanKeys) {
      const Span span = load_span(first);
      for (int row = 0; row < rows_;) {
        const int rows = std::min(tiled ? kBlock : kVectorRows, rows_ - row);
        if (first < visible(row + rows - 1)) {
          tiled ? score_by_tiles(span, row, rows) : score_by_vectors(span, row, rows);
          for (int r = 0; r < rows; ++r) weigh(span, first, row + r, r);
          tiled ? add_by_tiles(span, row, rows) : add_by_vectors(span, row, rows);
        }
        row += rows;
      }
    }
    const int dim = shape_.head_dim;
    for (int row = 0; row < rows_; ++row) {
      const __m512 factor = _mm512_set1_ps(1.0f / total_[row]);
      float* to = out + place(row, out_stride);
      for (int d = 0; d < dim; d += kLanes)
        _mm512_storeu_ps(to + d, _mm512_mul_ps(_mm512_load_ps(sums_ + row * dim + d), factor));
    }
  }

 private:
  // How many keys a row sees.
  int visible(int row) const { return context_.first_position + (first_row_ + row) / group_ + 1; }

  size_t place(int row, size_t stride) const {
    return (first_row_ + row) / group_ * stride + (first_row_ + row) % group_ * shape_.head_dim;
  }

  // By the shape alone, and never by the number of rows: the two ways round differently, and what a token gets must not
  // depend on how many others are computed with it.
  bool use_tiles() const {
#ifdef __AMX_BF16__
    return shape_.head_dim % 32 == 0;
#else
    return false;
#endif
  }

  void load_queries(const float* queries, size_t stride) {
    const int dim = shape_.head_dim;
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(static_cast<float>(dim)));
    for (int row = 0; row < rows_; ++row) {
      const float* from = queries + place(row, stride);
      for (int d = 0; d < dim; d += kLanes)
        _mm256_store_si256(reinterpret_cast<__m256i*>(queries_ + row * dim + d),
                           to_bf16(_mm512_mul_ps(_mm512_loadu_ps(from + d), factor)));
    }
  }

  Span load_span(int first_key) {
    Span span{};
    const int first = first_key / kBlock, numbers = kBlock * shape_.head_dim;
    span.blocks = std::min(kSpan, (last_key_ + kBlock - 1) / kBlock - first);
    for (int i = 0; i < span.blocks; ++i) {
      const uint8_t* at =
          context_.layer + context_.blocks[first + i] * shape_.block_bytes() + head_ * shape_.head_bytes();
      if (!shape_.int8) {
        span.keys[i] = reinterpret_cast<const uint16_t*>(at);
        span.values[i] = span.keys[i] + numbers;
        continue;
      }
      uint16_t* widened = widened_ + static_cast<size_t>(i) * numbers * 2;
      widen(reinterpret_cast<const int8_t*>(at), numbers * 2, widened);
      span.keys[i] = widened;
      span.values[i] = widened + numbers;
      span.key_scales[i] = reinterpret_cast<const float*>(at + numbers * 2);
      span.value_scales[i] = span.key_scales[i] + kBlock;
    }
    return span;
  }

  // From a row's scores to its weights, as pairs of bfloat16; what was summed up before is scaled to the new maximum.
  void weigh(const Span& span, int first_key, int row, int r) {
    float* scores = scores_ + r * kSpanKeys;
    const int keys = visible(row) - first_key;
    __m512 most = _mm512_set1_ps(most_[row]);
    for (int i = 0; i < span.blocks; ++i) {
      __m512 score = _mm512_load_ps(scores + i * kBlock);
      if (span.key_scales[i] != nullptr) score = _mm512_mul_ps(score, _mm512_loadu_ps(span.key_scales[i]));
      _mm512_store_ps(scores + i * kBlock, score);
      most = _mm512_mask_max_ps(most, first_lanes(keys - i * kBlock), most, score);
    }
    const float maximum = _mm512_reduce_max_ps(most);
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < span.blocks; ++i) {
      const __m512 less = _mm512_sub_ps(_mm512_load_ps(scores + i * kBlock), _mm512_set1_ps(maximum));
      __m512 weight = _mm512_maskz_mov_ps(first_lanes(keys - i * kBlock), exp(less));
      total = _mm512_add_ps(total, weight);
      if (span.value_scales[i] != nullptr) weight = _mm512_mul_ps(weight, _mm512_loadu_ps(span.value_scales[i]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights_ + r * kSpanKeys + i * kBlock), to_bf16(weight));
    }
    const float shrink = std::exp(most_[row] - maximum);
    most_[row] = maximum;
    total_[row] = total_[row] * shrink + _mm512_reduce_add_ps(total);
    if (shrink == 1.0f) return;
    float* sums = sums_ + row * shape_.head_dim;
    for (int d = 0; d < shape_.head_dim; d += kLanes)
      _mm512_store_ps(sums + d, _mm512_mul_ps(_mm512_load_ps(sums + d), _mm512_set1_ps(shrink)));
  }

  static __m512i pair(const uint16_t* at) {
    int32_t both;
    std::memcpy(&both, at, 4);
    return _mm512_set1_epi32(both);
  }

  template <int R>
  void score_rows(const Span& span, int row) {
    const int dim = shape_.head_dim;
    for (int i = 0; i < span.blocks; ++i) {
      __m512 sum[R];
      for (int r = 0; r < R; ++r) sum[r] = _mm512_setzero_ps();
      for (int d = 0; d < dim; d += 2) {
        const __m512i keys = _mm512_loadu_si512(span.keys[i] + d * kBlock);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r] = dot_bf16(sum[r], keys, pair(queries_ + (row + r) * dim + d));
      }
      for (int r = 0; r < R; ++r) _mm512_store_ps(scores_ + r * kSpanKeys + i * kBlock, sum[r]);
    }
  }

  template <int R>
  void add_rows(const Span& span, int row) {
    const int dim = shape_.head_dim;
    for (int d = 0; d < dim; d += kLanes) {
      __m512 sum[R];
      for (int r = 0; r < R; ++r) sum[r] = _mm512_load_ps(sums_ + (row + r) * dim + d);
      for (int i = 0; i < span.blocks; ++i) {
#pragma GCC unroll 8
        for (int key = 0; key < kBlock; key += 2) {
          const __m512i values = _mm512_loadu_si512(span.values[i] + key * dim + d * 2);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            sum[r] = dot_bf16(sum[r], values, pair(weights_ + r * kSpanKeys + i * kBlock + key));
        }
      }
      for (int r = 0; r < R; ++r) _mm512_store_ps(sums_ + (row + r) * dim + d, sum[r]);
    }
  }

  void score_by_vectors(const Span& span, int row, int rows) {
    with_rows(rows, [&](auto count) { score_rows<count()>(span, row); });
  }

  void add_by_vectors(const Span& span, int row, int rows) {
    with_rows(rows, [&](auto count) { add_rows<count()>(span, row); });
  }

#ifdef __AMX_BF16__
  // Up to 16 rows of queries against blocks of 16 keys, two blocks at a time so that their products overlap.
  void score_by_tiles(const Span& span, int row, int rows) {
    const int dim = shape_.head_dim;
    configure_tiles(rows, 64, kBlock);
    for (int i = 0; i < span.blocks; i += 2) {
      const bool both = i + 1 < span.blocks;
      _tile_zero(0);
      _tile_zero(1);
      for (int d = 0; d < dim; d += 32) {
        _tile_loadd(6, queries_ + row * dim + d, dim * 2);
        _tile_loadd(4, span.keys[i] + d * kBlock, 64);
        _tile_dpbf16ps(0, 6, 4);
        if (!both) continue;
        _tile_loadd(5, span.keys[i + 1] + d * kBlock, 64);
        _tile_dpbf16ps(1, 6, 5);
      }
      _tile_stored(0, scores_ + i * kBlock, kSpanKeys * 4);
      if (both) _tile_stored(1, scores_ + (i + 1) * kBlock, kSpanKeys * 4);
    }
  }

  // Up to 16 rows of weights over 16 keys (half the depth of a tile) times their values; 32 outputs at a time.
  void add_by_tiles(const Span& span, int row, int rows) {
    const int dim = shape_.head_dim;
    configure_tiles(rows, 32, kBlock / 2);
    for (int d = 0; d < dim; d += 32) {
      float* sums = sums_ + row * dim + d;
      _tile_loadd(0, sums, dim * 4);
      _tile_loadd(1, sums + kBlock, dim * 4);
      for (int i = 0; i < span.blocks; ++i) {
        _tile_loadd(6, weights_ + i * kBlock, kSpanKeys * 2);
        _tile_loadd(4, span.values[i] + d * 2, dim * 4);
        _tile_dpbf16ps(0, 6, 4);
        _tile_loadd(5, span.values[i] + (d + kBlock) * 2, dim * 4);
        _tile_dpbf16ps(1, 6, 5);
      }
      _tile_stored(0, sums, dim * 4);
      _tile_stored(1, sums + kBlock, dim * 4);
    }
  }
#else
  void score_by_tiles(const Span&, int, int) {}
  void add_by_tiles(const Span&, int, int) {}
#endif

  const CacheShape& shape_;
  const Context& context_;
  int head_, group_, first_row_, rows_, last_key_;
  alignas(64) float most_[kQueryRows], total_[kQueryRows];
  alignas(64) float scores_[kBlock * kSpanKeys];
  alignas(64) uint16_t weights_[kBlock * kSpanKeys];
  alignas(64) float sums_[kQueryRows * kMostHeadDim];
  alignas(64) uint16_t queries_[kQueryRows * kMostHeadDim];
  alignas(64) uint16_t widened_[kSpanKeys * kMostHeadDim * 2];
};

}  // namespace

void store_token(const CacheShape& shape, uint8_t* layer, int slot, const float* keys, const float* values) {
  const int dim = shape.head_dim, offset = slot % kBlock, numbers = kBlock * dim;
  for (int head = 0; head < shape.kv_heads; ++head, keys += dim, values += dim) {
    uint8_t* at = layer + slot / kBlock * shape.block_bytes() + head * shape.head_bytes();
    if (shape.int8) {
      int8_t key[kMostHeadDim], value[kMostHeadDim];
      float* scales = reinterpret_cast<float*>(at + numbers * 2);
      scales[offset] = to_int8(keys, dim, key);
      scales[kBlock + offset] = to_int8(values, dim, value);
      scatter(reinterpret_cast<int8_t*>(at), reinterpret_cast<int8_t*>(at) + numbers, dim, offset, key, value);
    } else {
      uint16_t key[kMostHeadDim], value[kMostHeadDim];
      for (int d = 0; d < dim; ++d) key[d] = bf16(keys[d]), value[d] = bf16(values[d]);
      scatter(reinterpret_cast<uint16_t*>(at), reinterpret_cast<uint16_t*>(at) + numbers, dim, offset, key, value);
    }
  }
}

void attend(const CacheShape& shape, const Context& context, int head, int group, int first_row, int rows,
            const float* queries, size_t query_stride, float* out, size_t out_stride) {
  Attention(shape, context, head, group, first_row, rows).run(queries, query_stride, out, out_stride);
}

}  // namespace nio
