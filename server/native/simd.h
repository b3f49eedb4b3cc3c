// The vector operations that more than one file needs. Everything here needs AVX-512 (F, BW, DQ, VL, VNNI).
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace nio {

constexpr int kLanes = 16;  // 32-bit values in a vector

// e^x. Range reduction to 2^n * 2^f with |f| <= 0.5 and a polynomial for 2^f: within 3e-7 of the exact value.
inline __m512 exp(__m512 x) {
  const __m512 scaled = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100.0f)), _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(scaled, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 e = exp(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// sum[i] + a[2i] * b[2i] + a[2i+1] * b[2i+1] over pairs of bfloat16.
inline __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)),
                        sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)), _mm512_castsi512_ps(_mm512_and_si512(b, high)),
                         sum);
#endif
}

// 16 floats as bfloat16, rounded to the nearest.
inline __m256i to_bf16(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16));
#endif
}

// Calls work(std::integral_constant<int, rows>) for 1 to 8 rows: code for a number of rows keeps them in registers.
template <int R = 1, typename Work>
inline void with_rows(int rows, const Work& work) {
  if (rows == R) {
    work(std::integral_constant<int, R>{});
  } else if constexpr (R < 8) {
    with_rows<R + 1>(rows, work);
  }
}

inline __mmask16 first_lanes(int count) {
  return count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (count > 0 ? count : 0)) - 1);
}

// What RMSNorm (Zhang 2019) multiplies x[count] with, beside its weights: 1 / sqrt(mean(x^2) + eps).
inline float norm_factor(const float* x, int count, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < count; i += kLanes) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(count - i), x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  return 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(count) + eps);
}

}  // namespace nio
