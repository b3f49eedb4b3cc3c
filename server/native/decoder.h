// One step of a decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3) with INT8 weights.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "pool.h"
#include "product.h"

namespace nio {

// All pointers are the caller's, who keeps what they point at alive. Shared with Python: see ctypes' mirror of it
// there.
struct Shape {
  int32_t hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
  float norm_eps;
  int32_t int8_cache, threads;
  const float* rotations;  // cosines and sines, [positions][2][head_dim / 2]
};

struct Layer {
  const float* input_norm;
  const Linear* qkv;
  const float *query_norm, *key_norm;  // [head_dim], or null
  const Linear* out;
  const float* post_norm;
  const Linear *gate_up, *down;
};

struct Ends {
  const Linear* tied_embedding;  // the output layer's own weights, or null: then the two below
  const int8_t* embedding;       // [vocabulary][hidden]
  const float* embedding_scale;  // [vocabulary]
  const float* norm;
  const Linear* head;
};

// The tokens of all sequences, one after the other, and what is wanted of them.
struct Step {
  int32_t tokens, sequences, logit_rows, pooled;
  const int32_t *ids, *positions;  // [tokens]
  const int32_t* first_token;      // [sequences + 1]
  const int32_t* blocks;           // each sequence's blocks, one after the other
  const int32_t* first_block;      // [sequences]
  const int32_t* rows;             // [logit_rows] tokens
  const int32_t* spans;            // [pooled][2] first token and the one after the last
  uint8_t* const* layers;          // the cache, a pointer for each layer
  float *logits, *pooled_sums;     // [logit_rows][vocabulary], [pooled][hidden]
};

class Decoder {
 public:
  Decoder(const Shape& shape, const Layer* layers, int count, const Ends& ends);

  void step(const Step& step);

  Pool& pool() { return pool_; }

 private:
  // Calls work(row) for 0..rows-1, on all threads where `floats` a row make that worth it.
  template <typename Work>
  void for_rows(int rows, int floats, const Work& work);

  void reserve(int tokens);
  void quantise(int rows, const float* from, int inputs, const Linear& to, const float* norm, const int32_t* which);
  void multiply(const Linear& linear, int rows, Sink sink, float* out, size_t stride);
  void place_token(const Step& step, int token, const Layer& layer, uint8_t* cache);
  void attend_all(const Step& step, const uint8_t* cache);

  Shape shape_;
  CacheShape cache_shape_;
  std::vector<Layer> layers_;
  Ends ends_;
  Pool pool_;
  int group_, qkv_width_, query_width_, reserved_ = 0;
  std::vector<float> x_, qkv_, attended_, gated_, step_, low_;
  std::vector<uint8_t> planes_;
  std::vector<int32_t> sequence_of_;
  struct Task {
    int sequence, head, first_row, rows;
  };
  std::vector<Task> tasks_;
};

}  // namespace nio
