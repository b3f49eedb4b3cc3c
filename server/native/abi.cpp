// What Python calls, through ctypes. No exception crosses this line: what cannot be made is null.

#include <sys/syscall.h>
#include <unistd.h>

#include <exception>

#include "decoder.h"

using nio::Decoder;
using nio::Linear;

#define NIO_EXPORT __attribute__((visibility("default")))

extern "C" {

// Asks the kernel for the tile unit, which a process has to before it uses it; 0 when it may (or needs none).
NIO_EXPORT int nio_prepare() {
#ifdef __AMX_INT8__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return static_cast<int>(syscall(SYS_arch_prctl, kRequestPermission, kTileData));
#else
  return 0;
#endif
}

NIO_EXPORT Linear* nio_linear_new(const int8_t* weight, const float* scale, const float* bias, int outputs, int inputs,
                                  int wide, int gated) {
  try {
    return new Linear(weight, scale, bias, outputs, inputs, wide != 0, gated != 0);
  } catch (const std::exception&) {
    return nullptr;
  }
}

NIO_EXPORT void nio_linear_free(Linear* linear) {
  delete linear;
}

// out[rows][outputs] = x[rows][inputs] . weight^T + bias, for tests and the check at start-up.
NIO_EXPORT void nio_linear_apply(const Linear* linear, const float* x, int rows, float* out) {
  const int row_tiles = nio::tiles(rows, 2 * nio::kTileRows) * 2;
  const size_t plane = static_cast<size_t>(row_tiles) * linear->depth * nio::kTile;
  std::vector<uint8_t> bytes(2 * plane);
  std::vector<float> step(rows), low(rows);
  nio::Activations in{{bytes.data(), bytes.data() + plane}, step.data(), low.data(), rows, linear->depth, linear->wide};
  for (int row = 0; row < rows; ++row)
    nio::quantise_row(in, row, x + static_cast<size_t>(row) * linear->inputs, linear->inputs, nullptr, 0.0f);
  const int columns = linear->gated ? linear->outputs / 2 : linear->outputs;
  for (int pair = 0; pair < linear->pairs; ++pair)
    nio::product(*linear, in, pair, linear->gated ? nio::Sink::kSwiGlu : nio::Sink::kStore, out, columns);
}

NIO_EXPORT size_t nio_cache_block_bytes(int kv_heads, int head_dim, int int8) {
  return nio::CacheShape{kv_heads, head_dim, int8 != 0}.block_bytes();
}

NIO_EXPORT Decoder* nio_decoder_new(const nio::Shape* shape, const nio::Layer* layers, int count,
                                    const nio::Ends* ends) {
  try {
    return new Decoder(*shape, layers, count, *ends);
  } catch (const std::exception&) {
    return nullptr;
  }
}

NIO_EXPORT void nio_decoder_free(Decoder* decoder) {
  delete decoder;
}

// 0 when done; 1 when memory ran out, and nothing of the step can be used.
NIO_EXPORT int nio_decoder_step(Decoder* decoder, const nio::Step* step) {
  try {
    decoder->step(*step);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // extern "C"
