#include "decoder.h"

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace nio {
namespace {

constexpr int kTasksPerThread = 6;       // few enough to be cheap, enough for the others to make up for a slow one
constexpr int kWorthSharing = 8 * 1024;  // floats; below, waking the other threads takes longer than the work

// Rotates the two halves of a head (Su 2021): (a, b) -> (a cos - b sin, b cos + a sin).
void rotate(float* head, const float* rotation, int half) {
  for (int i = 0; i < half; i += kLanes) {
    const __mmask16 mask = first_lanes(half - i);
    const __m512 a = _mm512_maskz_loadu_ps(mask, head + i), b = _mm512_maskz_loadu_ps(mask, head + half + i);
    const __m512 cosine = _mm512_maskz_loadu_ps(mask, rotation + i);
    const __m512 sine = _mm512_maskz_loadu_ps(mask, rotation + half + i);
    _mm512_mask_storeu_ps(head + i, mask, _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine)));
    _mm512_mask_storeu_ps(head + half + i, mask, _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine)));
  }
}

void norm_head(float* head, const float* weight, int count, float eps) {
  if (weight == nullptr) return;
  const float factor = norm_factor(head, count, eps);
  for (int i = 0; i < count; ++i) head[i] *= factor * weight[i];
}

}  // namespace

Decoder::Decoder(const Shape& shape, const Layer* layers, int count, const Ends& ends)
    : shape_(shape),
      cache_shape_{shape.kv_heads, shape.head_dim, shape.int8_cache != 0},
      layers_(layers, layers + count),
      ends_(ends),
      pool_(shape.threads),
      group_(shape.heads / shape.kv_heads),
      qkv_width_((shape.heads + 2 * shape.kv_heads) * shape.head_dim),
      query_width_(shape.heads * shape.head_dim) {}

template <typename Work>
void Decoder::for_rows(int rows, int floats, const Work& work) {
  if (static_cast<int64_t>(rows) * floats < kWorthSharing) {
    for (int row = 0; row < rows; ++row) work(row);
    return;
  }
  // Whole tiles of rows, so that no two threads write to one cache line.
  const int chunk = rows >= kTileRows * pool_.threads() ? kTileRows : tiles(rows, pool_.threads());
  pool_.run(tiles(rows, chunk), [&](int task) {
    for (int row = task * chunk; row < std::min(rows, (task + 1) * chunk); ++row) work(row);
  });
}

void Decoder::reserve(int tokens) {
  if (tokens <= reserved_) return;
  reserved_ = tiles(tokens, 2 * kTileRows) * 2 * kTileRows;
  const size_t rows = reserved_;
  x_.resize(rows * shape_.hidden);
  qkv_.resize(rows * qkv_width_);
  attended_.resize(rows * query_width_);
  gated_.resize(rows * shape_.intermediate);
  step_.resize(rows);
  low_.resize(rows);
  const int widest = std::max({shape_.hidden, query_width_, shape_.intermediate});
  planes_.resize(2 * rows * tiles(widest, kTileDepth) * kTileDepth + kTileDepth);
  sequence_of_.resize(rows);
}

namespace {

// The buffer for activations, seen as those of one linear layer.
Activations view(std::vector<uint8_t>& planes, std::vector<float>& step, std::vector<float>& low, int rows,
                 const Linear& linear) {
  Activations out{};
  out.rows = rows;
  out.depth = linear.depth;
  out.wide = linear.wide;
  out.step = step.data();
  out.low = low.data();
  const auto start = reinterpret_cast<uintptr_t>(planes.data());
  out.planes[0] = planes.data() + (kTileDepth - start % kTileDepth) % kTileDepth;
  out.planes[1] = out.planes[0] + static_cast<size_t>(tiles(rows, kTileRows)) * linear.depth * kTile;
  return out;
}

}  // namespace

void Decoder::quantise(int rows, const float* from, int inputs, const Linear& to, const float* norm,
                       const int32_t* which) {
  Activations out = view(planes_, step_, low_, rows, to);
  for_rows(rows, inputs, [&](int row) {
    const int source = which == nullptr ? row : which[row];
    quantise_row(out, row, from + static_cast<size_t>(source) * inputs, inputs, norm, shape_.norm_eps);
  });
}

void Decoder::multiply(const Linear& linear, int rows, Sink sink, float* out, size_t stride) {
  const Activations in = view(planes_, step_, low_, rows, linear);
  // Some pairs a task: handing one out costs two lines of memory that travel between the cores.
  const int chunk = std::max(1, linear.pairs / (kTasksPerThread * pool_.threads()));
  pool_.run(tiles(linear.pairs, chunk), [&](int task) {
    for (int pair = task * chunk; pair < std::min(linear.pairs, (task + 1) * chunk); ++pair)
      product(linear, in, pair, sink, out, stride);
  });
}

void Decoder::place_token(const Step& step, int token, const Layer& layer, uint8_t* cache) {
  const int dim = shape_.head_dim, position = step.positions[token];
  const float* rotation = shape_.rotations + static_cast<size_t>(position) * dim;
  float* row = qkv_.data() + static_cast<size_t>(token) * qkv_width_;
  for (int head = 0; head < shape_.heads + shape_.kv_heads; ++head) {
    norm_head(row + head * dim, head < shape_.heads ? layer.query_norm : layer.key_norm, dim, shape_.norm_eps);
    rotate(row + head * dim, rotation, dim / 2);
  }
  const int32_t* blocks = step.blocks + step.first_block[sequence_of_[token]];
  const int slot = blocks[position / kBlock] * kBlock + position % kBlock;
  const float* keys = row + query_width_;
  store_token(cache_shape_, cache, slot, keys, keys + shape_.kv_heads * dim);
}

void Decoder::attend_all(const Step& step, const uint8_t* cache) {
  pool_.run(static_cast<int>(tasks_.size()), [&](int index) {
    const Task& task = tasks_[index];
    const int first = step.first_token[task.sequence], offset = task.head * group_ * shape_.head_dim;
    const Context context{cache, step.blocks + step.first_block[task.sequence], step.positions[first]};
    attend(cache_shape_, context, task.head, group_, task.first_row, task.rows,
           qkv_.data() + static_cast<size_t>(first) * qkv_width_ + offset, qkv_width_,
           attended_.data() + static_cast<size_t>(first) * query_width_ + offset, query_width_);
  });
}

void Decoder::step(const Step& step) {
  const int tokens = step.tokens, hidden = shape_.hidden;
  reserve(std::max(tokens, step.logit_rows));
  tasks_.clear();
  for (int sequence = 0; sequence < step.sequences; ++sequence) {
    const int first = step.first_token[sequence], last = step.first_token[sequence + 1];
    std::fill(sequence_of_.begin() + first, sequence_of_.begin() + last, sequence);
    const int rows = (last - first) * group_;
    for (int head = 0; head < shape_.kv_heads; ++head)
      for (int row = 0; row < rows; row += kQueryRows)
        tasks_.push_back({sequence, head, row, std::min(kQueryRows, rows - row)});
  }
  for_rows(tokens, hidden, [&](int token) {
    float* x = x_.data() + static_cast<size_t>(token) * hidden;
    const int id = step.ids[token];
    if (ends_.tied_embedding != nullptr) {
      ends_.tied_embedding->row(id, x);
      return;
    }
    const int8_t* from = ends_.embedding + static_cast<size_t>(id) * hidden;
    for (int i = 0; i < hidden; ++i) x[i] = ends_.embedding_scale[id] * from[i];
  });
  for (size_t index = 0; index < layers_.size(); ++index) {
    const Layer& layer = layers_[index];
    uint8_t* cache = step.layers[index];
    quantise(tokens, x_.data(), hidden, *layer.qkv, layer.input_norm, nullptr);
    multiply(*layer.qkv, tokens, Sink::kStore, qkv_.data(), qkv_width_);
    for_rows(tokens, 4 * qkv_width_, [&](int token) { place_token(step, token, layer, cache); });
    attend_all(step, cache);
    quantise(tokens, attended_.data(), query_width_, *layer.out, nullptr, nullptr);
    multiply(*layer.out, tokens, Sink::kAdd, x_.data(), hidden);
    quantise(tokens, x_.data(), hidden, *layer.gate_up, layer.post_norm, nullptr);
    multiply(*layer.gate_up, tokens, Sink::kSwiGlu, gated_.data(), shape_.intermediate);
    quantise(tokens, gated_.data(), shape_.intermediate, *layer.down, nullptr, nullptr);
    multiply(*layer.down, tokens, Sink::kAdd, x_.data(), hidden);
  }
  if (step.logit_rows > 0) {
    quantise(step.logit_rows, x_.data(), hidden, *ends_.head, ends_.norm, step.rows);
    multiply(*ends_.head, step.logit_rows, Sink::kStore, step.logits, shape_.vocabulary);
  }
  for (int i = 0; i < step.pooled; ++i) {
    float* sums = step.pooled_sums + static_cast<size_t>(i) * hidden;
    std::fill_n(sums, hidden, 0.0f);
    for (int token = step.spans[2 * i]; token < step.spans[2 * i + 1]; ++token) {
      const float* x = x_.data() + static_cast<size_t>(token) * hidden;
      const float factor = norm_factor(x, hidden, shape_.norm_eps);
      for (int d = 0; d < hidden; ++d) sums[d] += x[d] * factor * ends_.norm[d];
    }
  }
}

}  // namespace nio
