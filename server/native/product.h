// Products of quantised activations with INT8 weights.
//
// A row x is written as low + step * q with unsigned q, a weight row as scale * w with signed w, so that
//   x . w = step * scale * (q . w) + low * row_sum,   row_sum = scale * sum(w)
// and only q . w is computed, in integers. q has 8 bits; for layers that are sensitive ("wide") it has 16, kept as a
// high and a low byte, each of which is multiplied by the same weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nio {

constexpr int kTileRows = 16;                  // rows of activations in a tile, and outputs in a tile of weights
constexpr int kTileDepth = 64;                 // inputs in a tile
constexpr int kTile = kTileRows * kTileDepth;  // bytes
constexpr int kPair = 2 * kTileRows;           // outputs that one task computes

inline int tiles(int count, int size) {
  return (count + size - 1) / size;
}

// Weights, packed for the tile unit and for VNNI alike: [pair of 16 outputs][depth][2][16 groups of 4 inputs][16][4].
// With `gated`, each pair holds 16 rows of the first half of the outputs and the matching 16 of the second.
struct Linear {
  Linear(const int8_t* weight, const float* scale, const float* bias, int outputs, int inputs, bool wide, bool gated);
  ~Linear();
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  // Dequantises one row into out[inputs]: the token embedding, where it shares its weights with the output layer.
  void row(int output, float* out) const;

  int outputs, inputs, depth, pairs;
  bool wide, gated;
  size_t bytes;
  int8_t* weight;
  float *scale, *row_sum, *bias;  // in the packed order, padded with zeros
};

// Rows of quantised activations: [planes][tiles of 16 rows][depth][16][64] bytes, and what turns them back into floats.
struct Activations {
  uint8_t* planes[2];
  float *step, *low;
  int rows, depth;
  bool wide;

  const uint8_t* at(int plane, int row) const {
    return planes[plane] + (static_cast<size_t>(row / kTileRows) * depth) * kTile + (row % kTileRows) * kTileDepth;
  }
  uint8_t* at(int plane, int row) {
    return planes[plane] + (static_cast<size_t>(row / kTileRows) * depth) * kTile + (row % kTileRows) * kTileDepth;
  }
};

// Quantises x[inputs] into row `row`; with `norm`, x / sqrt(mean(x^2) + eps) * norm instead of x (RMSNorm, Zhang 2019).
void quantise_row(Activations& out, int row, const float* x, int inputs, const float* norm, float eps);

// What becomes of a product.
enum class Sink {
  kStore,   // out[row][output] = y
  kAdd,     // out[row][output] += y
  kSwiGlu,  // out[row][output / 2] = silu(first half) * second half, of a gated layer (Shazeer 2020)
};

// Computes outputs 32 * pair .. 32 * pair + 31 of all rows.
void product(const Linear& linear, const Activations& in, int pair, Sink sink, float* out, size_t out_stride);

}  // namespace nio
