// NF4 on a CPU: the contract of nf4.py, bit for bit, in one pass over memory.
//
// Compiled without fused multiply-add (-ffp-contract=off): every product and sum is rounded by itself. A block's sixteen
// products NF4_CODE[k] * scale are made and cast once, and its elements are looked up among them, so dequantizing costs
// one shuffle a byte of output. The lookup has a version for AVX2; elsewhere it is a plain loop.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kBlock = 64;             // elements that share a scale
constexpr int64_t kSerialElements = 65536;  // fewer than these are not worth a second thread

// Blocks that a thread takes at a time, so that one that is held up leaves the rest to the others.
inline int64_t share(int64_t blocks, int threads) {
  const int64_t even = blocks / (4 * static_cast<int64_t>(threads));
  return even < 16 ? 16 : even > 1024 ? 1024 : even;
}

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline float to_float(BFloat16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void from_float(float x, float& out) { out = x; }
inline void from_float(float x, _Float16& out) { out = static_cast<_Float16>(x); }
inline void from_float(float x, BFloat16& out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  out.bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Of `count` values (at most kBlock) the largest magnitude, or a value that is not finite where there is one.
inline float largest_magnitude(const float* values, int64_t count) {
  uint32_t largest = 0;  // without their sign, floats are ordered as their bits are, infinity and NaN above all
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof magnitude);
  return magnitude;
}

template <typename T>
void quantize_block(const T* values, int64_t count, const float* midpoints, uint8_t* packed, float* maximum) {
  float scaled[kBlock];
  int32_t codes[kBlock] = {};
  for (int64_t i = 0; i < count; ++i) scaled[i] = to_float(values[i]);
  *maximum = largest_magnitude(scaled, count);
  const float divisor = *maximum < 1e-38f ? 1e-38f : *maximum;  // one that is not finite stays
  const bool whole = count == kBlock;
  if (!whole) *maximum = divisor;        // of a short last block bitsandbytes keeps the divisor,
  const float inverse = 1.0f / divisor;  // and divides by it where it multiplies the others by the inverse
  for (int64_t i = 0; i < count; ++i) scaled[i] = whole ? scaled[i] * inverse : scaled[i] / divisor;
  if (count % 2) scaled[count++] = 0.0f;
  for (int k = 0; k < 15; ++k)
    for (int64_t i = 0; i < count; ++i) codes[i] += scaled[i] > midpoints[k];
  for (int64_t i = 0; i < count; i += 2) packed[i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
}

template <typename T>
void quantize(const T* values, int64_t count, const float* midpoints, uint8_t* packed, float* maxima, int threads) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const int64_t share_blocks = share(blocks, threads);
#pragma omp parallel for schedule(dynamic, share_blocks) num_threads(threads) if (count > kSerialElements)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t here = count - begin < kBlock ? count - begin : kBlock;
    quantize_block(values + begin, here, midpoints, packed + begin / 2, maxima + block);
  }
}

// out[i] = table[code i] for `count` codes from element `begin` on, the first of a byte in its high half.
template <typename T>
inline void look_up(const uint8_t* packed, int64_t begin, int64_t count, const T* table, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t element = begin + i;
    const uint8_t byte = packed[element / 2];
    out[i] = table[element % 2 ? byte & 15 : byte >> 4];
  }
}

#if defined(__AVX2__)
// Byte k of each of the sixteen table entries, in both halves of a register.
template <typename T>
inline __m256i byte_plane(const T* table, int k) {
  alignas(16) uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = reinterpret_cast<const uint8_t*>(table + i)[k];
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// 32 codes, one a byte, in order.
inline __m256i unpack_codes(const uint8_t* packed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15));
  return _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
}

inline void store(void* out, __m128i value) { _mm_storeu_si128(static_cast<__m128i*>(out), value); }

// The same for `count` codes, a multiple of 32, that begin at a byte: the table is looked up a byte of its entries at a
// time, and the bytes are interleaved again.
template <typename T>
inline void look_up_32s(const uint8_t* packed, int64_t count, const T* table, T* out) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "entries of two or four bytes");
  __m256i planes[sizeof(T)];
  for (int k = 0; k < static_cast<int>(sizeof(T)); ++k) planes[k] = byte_plane(table, k);
  for (int64_t i = 0; i < count; i += 32, out += 32) {
    const __m256i codes = unpack_codes(packed + i / 2);
    const __m256i first = _mm256_shuffle_epi8(planes[0], codes), second = _mm256_shuffle_epi8(planes[1], codes);
    // Unpacking works in each half: `low` holds elements 0-7 and 16-23, `high` the others.
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
    if constexpr (sizeof(T) == 2) {
      store(out, _mm256_castsi256_si128(low));
      store(out + 8, _mm256_castsi256_si128(high));
      store(out + 16, _mm256_extracti128_si256(low, 1));
      store(out + 24, _mm256_extracti128_si256(high, 1));
    } else {
      const __m256i third = _mm256_shuffle_epi8(planes[2], codes), fourth = _mm256_shuffle_epi8(planes[3], codes);
      const __m256i low2 = _mm256_unpacklo_epi8(third, fourth), high2 = _mm256_unpackhi_epi8(third, fourth);
      const __m256i quarters[4] = {_mm256_unpacklo_epi16(low, low2), _mm256_unpackhi_epi16(low, low2),
                                   _mm256_unpacklo_epi16(high, high2), _mm256_unpackhi_epi16(high, high2)};
      for (int q = 0; q < 4; ++q) {
        store(out + 4 * q, _mm256_castsi256_si128(quarters[q]));
        store(out + 16 + 4 * q, _mm256_extracti128_si256(quarters[q], 1));
      }
    }
  }
}
#endif

struct Scales {
  const uint8_t* absmax;
  const float* nested_absmax;
  const float* nested_code;
  float offset;
  int64_t nested_block_size;

  float operator()(int64_t block) const {
    return nested_code[absmax[block]] * nested_absmax[block / nested_block_size] + offset;
  }
};

template <typename T>
void dequantize(const uint8_t* packed, const Scales& scales, int64_t start, int64_t count, int64_t block_size,
                const float* code, T* out, int threads) {
  const int64_t first = start / block_size, last = (start + count + block_size - 1) / block_size;
  const int64_t share_blocks = share(last - first, threads);
#pragma omp parallel for schedule(dynamic, share_blocks) num_threads(threads) if (count > kSerialElements)
  for (int64_t block = first; block < last; ++block) {
    const float scale = scales(block);
    T table[16];
    for (int k = 0; k < 16; ++k) from_float(code[k] * scale, table[k]);
    const int64_t begin = block * block_size > start ? block * block_size : start;
    const int64_t end = (block + 1) * block_size < start + count ? (block + 1) * block_size : start + count;
    int64_t done = 0;
#if defined(__AVX2__)
    if (begin % 2 == 0) {
      done = (end - begin) / 32 * 32;
      look_up_32s(packed + begin / 2, done, table, out + (begin - start));
    }
#endif
    look_up(packed, begin + done, end - begin - done, table, out + (begin + done - start));
  }
}

}  // namespace

// dtype: 0 fp32, 1 fp16, 2 bf16. `code` and `midpoints` are NF4_CODE and the fifteen points between its neighbors.
extern "C" void quantize_nf4(const void* values, int64_t count, int dtype, const float* midpoints, uint8_t* packed,
                             float* maxima, int threads) {
  if (dtype == 0) quantize(static_cast<const float*>(values), count, midpoints, packed, maxima, threads);
  if (dtype == 1) quantize(static_cast<const _Float16*>(values), count, midpoints, packed, maxima, threads);
  if (dtype == 2) quantize(static_cast<const BFloat16*>(values), count, midpoints, packed, maxima, threads);
}

extern "C" void dequantize_nf4(const uint8_t* packed, const uint8_t* absmax, const float* nested_absmax,
                               const float* nested_code, const float* offset, int64_t start, int64_t count,
                               int64_t block_size, int64_t nested_block_size, const float* code, void* out, int dtype,
                               int threads) {
  const Scales scales{absmax, nested_absmax, nested_code, *offset, nested_block_size};
  if (dtype == 0) dequantize(packed, scales, start, count, block_size, code, static_cast<float*>(out), threads);
  if (dtype == 1) dequantize(packed, scales, start, count, block_size, code, static_cast<_Float16*>(out), threads);
  if (dtype == 2) dequantize(packed, scales, start, count, block_size, code, static_cast<BFloat16*>(out), threads);
}
