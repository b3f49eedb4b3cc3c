// The tile unit (Intel AMX): eight tiles of at most 16 rows of 64 bytes. Tiles 0 to 3 are sums, 4 and 5 the right-hand
// operands, 6 and 7 the left-hand ones.
#pragma once

#ifdef __AMX_INT8__

#include <immintrin.h>

#include <cstdint>

namespace nio {

// Sets the shapes of the operands: rows of the left one and of the sums, its bytes a row, and rows of the right one.
inline void configure_tiles(int left_rows, int left_bytes, int right_rows) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; ++tile) {
    shape.bytes[tile] = tile < 6 ? 64 : left_bytes;
    shape.rows[tile] = tile < 4 || tile > 5 ? left_rows : right_rows;
  }
  _tile_loadconfig(&shape);
}

}  // namespace nio

#endif
