#include "product.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <vector>

#include "simd.h"
#include "tile.h"

namespace nio {
namespace {

constexpr int kVectorRows = 8;  // that one pass over the weights can serve with the registers there are
#ifdef __AMX_INT8__
constexpr int kFewestTileRows = 3;  // from here on the tile unit is faster
#endif

// Zeroed memory in huge pages where the kernel has them: streaming 100 MB through 4 KB pages costs a tenth.
void* map_memory(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

// Integer sums of up to 16 rows times 32 outputs.
struct Sums {
  alignas(64) int32_t value[2][2][kTileRows][kTileRows];  // [plane or row tile][half of the pair][row][output]
};

// Applies scales, offsets and bias to the sums of one row, and hands them to the sink.
class Finish {
 public:
  Finish(const Linear& linear, const Activations& in, int pair, Sink sink, float* out, size_t stride)
      : in_(in), sink_(sink), out_(out), stride_(stride), gated_(linear.gated) {
    const int first = pair * kPair;
    for (int half = 0; half < 2; ++half) {
      scale_[half] = _mm512_loadu_ps(linear.scale + first + half * kTileRows);
      row_sum_[half] = _mm512_loadu_ps(linear.row_sum + first + half * kTileRows);
      bias_[half] = _mm512_loadu_ps(linear.bias + first + half * kTileRows);
    }
    column_ = gated_ ? first / 2 : first;
    const int columns = gated_ ? linear.outputs / 2 : linear.outputs;
    mask_[0] = first_lanes(columns - column_);
    mask_[1] = first_lanes(columns - column_ - kTileRows);
  }

  // `high` and `low` bytes' sums; `high` is null where activations have 8 bits.
  void row(int row, const __m512i* high, const __m512i* low) const {
    const __m512 step = _mm512_set1_ps(in_.step[row]), offset = _mm512_set1_ps(in_.low[row]);
    __m512 y[2];
    for (int half = 0; half < 2; ++half) {
      __m512 sum = _mm512_cvtepi32_ps(low[half]);
      if (high != nullptr) sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[half]), _mm512_set1_ps(256.0f), sum);
      y[half] = _mm512_fmadd_ps(offset, row_sum_[half], bias_[half]);
      y[half] = _mm512_fmadd_ps(_mm512_mul_ps(sum, scale_[half]), step, y[half]);
    }
    float* out = out_ + row * stride_ + column_;
    if (sink_ == Sink::kSwiGlu) {
      _mm512_mask_storeu_ps(out, mask_[0], _mm512_mul_ps(silu(y[0]), y[1]));
      return;
    }
    for (int half = 0; half < 2; ++half, out += kTileRows) {
      if (sink_ == Sink::kAdd) y[half] = _mm512_add_ps(y[half], _mm512_maskz_loadu_ps(mask_[half], out));
      _mm512_mask_storeu_ps(out, mask_[half], y[half]);
    }
  }

 private:
  const Activations& in_;
  Sink sink_;
  float* out_;
  size_t stride_;
  bool gated_;
  int column_;
  __m512 scale_[2], row_sum_[2], bias_[2];
  __mmask16 mask_[2];
};

// R rows at a time by vector instructions. The weights pass through once, which is all that counts for few rows.
template <int R>
void vector_rows(const int8_t* weight, int depth, const uint8_t* const* rows, __m512i (*sums)[2]) {
  __m512i sum[R][2];
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  for (int k = 0; k < depth; ++k, weight += 2 * kTile) {
    for (int q = 0; q < kTileDepth / 4; ++q) {
      const __m512i first = _mm512_load_si512(weight + q * 64), second = _mm512_load_si512(weight + kTile + q * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, rows[r] + static_cast<size_t>(k) * kTile + q * 4, 4);
        const __m512i inputs = _mm512_set1_epi32(four);
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], inputs, first);
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], inputs, second);
      }
    }
  }
  for (int r = 0; r < R; ++r) sums[r][0] = sum[r][0], sums[r][1] = sum[r][1];
}

void by_vectors(const Linear& linear, const Activations& in, const int8_t* weight, const Finish& finish) {
  const int planes = linear.wide ? 2 : 1, most = kVectorRows / planes;
  for (int first = 0; first < in.rows; first += most) {
    const int rows = std::min(most, in.rows - first);
    const uint8_t* pointers[kVectorRows];
    for (int plane = 0; plane < planes; ++plane)
      for (int r = 0; r < rows; ++r) pointers[plane * rows + r] = in.at(plane, first + r);
    __m512i sums[kVectorRows][2];
    with_rows(rows * planes, [&](auto count) { vector_rows<count()>(weight, linear.depth, pointers, sums); });
    for (int r = 0; r < rows; ++r) {
      if (linear.wide) {
        finish.row(first + r, sums[r], sums[rows + r]);
      } else {
        finish.row(first + r, nullptr, sums[r]);
      }
    }
  }
}

#ifdef __AMX_INT8__

// 16 or 32 rows of tiles: two of activations (high and low bytes, or two row tiles), two of weights, four of sums.
template <bool Two>
void tile_block(const int8_t* weight, int depth, const uint8_t* first, const uint8_t* second, Sums& sums) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < depth; ++k) {
    _tile_loadd(4, weight + static_cast<size_t>(k) * 2 * kTile, 64);
    _tile_loadd(6, first + static_cast<size_t>(k) * kTile, 64);
    _tile_dpbusd(0, 6, 4);
    _tile_loadd(5, weight + static_cast<size_t>(k) * 2 * kTile + kTile, 64);
    _tile_dpbusd(1, 6, 5);
    if constexpr (Two) {
      _tile_loadd(7, second + static_cast<size_t>(k) * kTile, 64);
      _tile_dpbusd(2, 7, 4);
      _tile_dpbusd(3, 7, 5);
    }
  }
  _tile_stored(0, sums.value[0][0], 64);
  _tile_stored(1, sums.value[0][1], 64);
  if constexpr (Two) {
    _tile_stored(2, sums.value[1][0], 64);
    _tile_stored(3, sums.value[1][1], 64);
  }
}

void by_tiles(const Linear& linear, const Activations& in, const int8_t* weight, const Finish& finish) {
  configure_tiles(std::min(kTileRows, in.rows), kTileDepth, kTileRows);
  Sums sums;
  const auto load = [&sums](int tile, int row, __m512i* out) {
    out[0] = _mm512_load_si512(sums.value[tile][0][row]);
    out[1] = _mm512_load_si512(sums.value[tile][1][row]);
  };
  __m512i high[2], low[2];
  if (linear.wide) {
    for (int first = 0; first < in.rows; first += kTileRows) {
      tile_block<true>(weight, linear.depth, in.at(0, first), in.at(1, first), sums);
      for (int r = 0; r < std::min(kTileRows, in.rows - first); ++r) {
        load(0, r, high);
        load(1, r, low);
        finish.row(first + r, high, low);
      }
    }
    return;
  }
  for (int first = 0; first < in.rows; first += 2 * kTileRows) {
    const int rows = std::min(2 * kTileRows, in.rows - first);
    if (rows > kTileRows) {
      tile_block<true>(weight, linear.depth, in.at(0, first), in.at(0, first + kTileRows), sums);
    } else {
      tile_block<false>(weight, linear.depth, in.at(0, first), nullptr, sums);
    }
    for (int r = 0; r < rows; ++r) {
      load(r / kTileRows, r % kTileRows, low);
      finish.row(first + r, nullptr, low);
    }
  }
}

#endif

}  // namespace

Linear::Linear(const int8_t* source, const float* source_scale, const float* source_bias, int outputs, int inputs,
               bool wide, bool gated)
    : outputs(outputs), inputs(inputs), depth(tiles(inputs, kTileDepth)), wide(wide), gated(gated) {
  const int half = gated ? outputs / 2 : outputs;
  pairs = gated ? tiles(half, kTileRows) : tiles(outputs, kPair);
  const size_t padded = static_cast<size_t>(pairs) * kPair, weights = padded * depth * kTileDepth;
  bytes = weights + 3 * padded * sizeof(float);
  weight = static_cast<int8_t*>(map_memory(bytes));
  scale = reinterpret_cast<float*>(weight + weights);
  row_sum = scale + padded;
  bias = row_sum + padded;
  for (size_t packed = 0; packed < padded; ++packed) {
    const int pair = static_cast<int>(packed / kPair), second = packed % kPair / kTileRows, lane = packed % kTileRows;
    const int within = gated ? pair * kTileRows + lane : static_cast<int>(packed);
    if (within >= half) continue;
    const int row = gated ? second * half + within : within;
    const int8_t* from = source + static_cast<size_t>(row) * inputs;
    int32_t sum = 0;
    for (int k = 0; k < inputs; ++k) sum += from[k];
    for (int k = 0; k < inputs; k += 4) {
      const size_t tile = (static_cast<size_t>(pair) * depth + k / kTileDepth) * 2 + second;
      std::memcpy(weight + tile * kTile + k % kTileDepth / 4 * 64 + lane * 4, from + k, std::min(4, inputs - k));
    }
    scale[packed] = source_scale[row];
    row_sum[packed] = source_scale[row] * static_cast<float>(sum);
    bias[packed] = source_bias == nullptr ? 0.0f : source_bias[row];
  }
}

Linear::~Linear() {
  munmap(weight, bytes);
}

void Linear::row(int output, float* out) const {
  const int pair = output / kPair, second = output % kPair / kTileRows, lane = output % kTileRows;
  for (int k = 0; k < inputs; ++k) {
    const size_t tile = (static_cast<size_t>(pair) * depth + k / kTileDepth) * 2 + second;
    out[k] = scale[output] * weight[tile * kTile + k % kTileDepth / 4 * 64 + lane * 4 + k % 4];
  }
}

void quantise_row(Activations& out, int row, const float* x, int inputs, const float* norm, float eps) {
  thread_local std::vector<float> normed;
  if (norm != nullptr) {
    const float factor = norm_factor(x, inputs, eps);
    normed.resize(inputs);
    for (int i = 0; i < inputs; i += kLanes) {
      const __mmask16 mask = first_lanes(inputs - i);
      const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(factor));
      _mm512_mask_storeu_ps(normed.data() + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, norm + i)));
    }
    x = normed.data();
  }
  __m512 least = _mm512_set1_ps(x[0]), most = least;
  for (int i = 0; i < inputs; i += kLanes) {
    const __mmask16 mask = first_lanes(inputs - i);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    least = _mm512_mask_min_ps(least, mask, least, v);
    most = _mm512_mask_max_ps(most, mask, most, v);
  }
  const float low = _mm512_reduce_min_ps(least);
  const float step = std::max((_mm512_reduce_max_ps(most) - low) / (out.wide ? 65535.0f : 255.0f), 1e-12f);
  out.low[row] = low;
  out.step[row] = step;
  const __m512 offset = _mm512_set1_ps(low), inverse = _mm512_set1_ps(1.0f / step), round = _mm512_set1_ps(0.5f);
  uint8_t* first = out.at(0, row);
  uint8_t* second = out.wide ? out.at(1, row) : nullptr;
  for (int i = 0; i < out.depth * kTileDepth; i += kLanes) {
    const __mmask16 mask = first_lanes(inputs - i);
    const __m512 v = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), offset);
    const __m512i q = _mm512_maskz_cvttps_epi32(mask, _mm512_fmadd_ps(v, inverse, round));
    const size_t at = static_cast<size_t>(i / kTileDepth) * kTile + i % kTileDepth;
    if (second == nullptr) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(first + at), _mm512_cvtusepi32_epi8(q));
    } else {
      const __m512i bounded = _mm512_min_epu32(q, _mm512_set1_epi32(65535));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(first + at), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bounded, 8)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(second + at), _mm512_cvtepi32_epi8(bounded));
    }
  }
}

void product(const Linear& linear, const Activations& in, int pair, Sink sink, float* out, size_t out_stride) {
  const int8_t* weight = linear.weight + static_cast<size_t>(pair) * linear.depth * 2 * kTile;
  const Finish finish(linear, in, pair, sink, out, out_stride);
#ifdef __AMX_INT8__
  if (in.rows * (linear.wide ? 2 : 1) >= kFewestTileRows) {
    by_tiles(linear, in, weight, finish);
    return;
  }
#endif
  by_vectors(linear, in, weight, finish);
}

}  // namespace nio
