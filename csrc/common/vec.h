// The vector type that kernels are written in, one width per instruction set.
//
// A kernel file is compiled once per instruction set (setup.py), each time with another
// BIT_KERNELS_ISA and the compiler's flags for it; cpu/isa.cpp picks one at run time. Everything here
// lives in that namespace, so no inline function of one build can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "element.h"

namespace bit_kernels {
namespace BIT_KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Vec broadcast(float value) { return Vec{} + value; }

inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// A NaN stays a NaN, as in torch.relu.
inline Vec relu(Vec v) { return v < Vec{} ? Vec{} : v; }

// The gradient where the output was positive (or NaN), as torch's threshold_backward.
inline Vec where_active(Vec output, Vec gradient) { return output <= Vec{} ? Vec{} : gradient; }

inline float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[kLanes];
  memcpy(lane, &v, sizeof v);
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
#endif
}

inline Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

// GCC takes bytes apart one by one where it is left to itself.
inline Vec load(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#elif defined(__SSE2__)
  const __m128i bytes = _mm_loadu_si32(p), zero = _mm_setzero_si128();
  return (Vec)_mm_cvtepi32_ps(_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero));
#else
  return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
#endif
}

// Two bytes to a lane; GCC would take twice as many shuffles.
inline Bits load_bits(const void* p) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  HalfBits half;
  memcpy(&half, p, sizeof half);
  return __builtin_convertvector(half, Bits);
#endif
}

inline Vec load(const BFloat16* p) { return (Vec)(load_bits(p) << 16); }

// A number's bfloat16 in the upper half of each lane; what is below has no meaning. Of the NaNs,
// those that a processor makes itself stay NaN.
inline Bits round_to_bfloat16(Vec v) {
  const Bits bits = (Bits)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline Bits to_bfloat16_bits(Vec v) {
  const Bits quiet_nan = Bits{} + 0x7fc0u;
  return v != v ? quiet_nan : round_to_bfloat16(v) >> 16;
}

inline HalfBits to_bfloat16(Vec v) { return __builtin_convertvector(to_bfloat16_bits(v), HalfBits); }

#if defined(__AVX512F__)
inline Vec load(const Float16* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline HalfBits to_float16(Vec v) {
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
inline Vec load(const Float16* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
inline HalfBits to_float16(Vec v) {
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// IEEE half by integer steps, for processors without a conversion instruction. Multiplying by a
// power of two moves the exponent and lets the float unit handle subnormals.
inline Vec load(const Float16* p) {
  HalfBits half;
  memcpy(&half, p, sizeof half);
  Bits wide = __builtin_convertvector(half, Bits);
  Bits sign = (wide & 0x8000u) << 16, magnitude = (wide & 0x7fffu) << 13;
  Vec scaled = (Vec)magnitude * 0x1p112f;
  Bits special = magnitude | 0x7f800000u;
  Bits bits = magnitude >= 0x0f800000u ? special : (Bits)scaled;
  return (Vec)(bits | sign);
}
inline HalfBits to_float16(Vec v) {
  Bits bits = (Bits)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  Bits normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal half in the low bits, rounded to nearest even by the addition.
  Bits subnormal = (Bits)((Vec)magnitude + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  return __builtin_convertvector(half | sign, HalfBits);
}
#endif

inline HalfBits narrow(const BFloat16*, Vec v) { return to_bfloat16(v); }
inline HalfBits narrow(const Float16*, Vec v) { return to_float16(v); }

template <class Half>
inline void store(Half* p, Vec v) {
  HalfBits half = narrow(p, v);
  memcpy(p, &half, sizeof half);
}

// `count` elements (fewer than kLanes), the lanes beyond them holding `fill`.
template <class T>
inline Vec load_first(const T* p, int64_t count, float fill = 0) {
  T padded[kLanes] = {};
  memcpy(padded, p, count * sizeof(T));
  float lane[kLanes];
  Vec v = load(padded);
  memcpy(lane, &v, sizeof v);
  for (int64_t i = count; i < kLanes; ++i) lane[i] = fill;
  return load(lane);
}

template <class T>
inline void store_first(T* p, Vec v, int64_t count) {
  T padded[kLanes];
  store(padded, v);
  memcpy(p, padded, count * sizeof(T));
}

// Past the cache: the line is not read before it is written. `p` must be aligned to one vector, and
// `finish_streaming` must follow before another thread reads.
inline void stream(float* p, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

template <class Half>
inline void stream(Half* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(p, v));
#elif defined(__AVX2__)
  _mm_stream_si128((__m128i*)p, (__m128i)narrow(p, v));
#else
  store(p, v);
#endif
}

// Two vectors of a half type, of which one alone would fill half a store. `p` as above.
template <class Half>
inline void stream(Half* p, Vec a, Vec b) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_castsi256_si512((__m256i)narrow(p, a));
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(low, (__m256i)narrow(p, b), 1));
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, _mm256_set_m128i((__m128i)narrow(p, b), (__m128i)narrow(p, a)));
#else
  store(p, a);
  store(p + kLanes, b);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// One packing for both.
inline void stream(BFloat16* p, Vec a, Vec b) {
  const __m256i packed =
      _mm256_packus_epi32((__m256i)to_bfloat16_bits(a), (__m256i)to_bfloat16_bits(b));
  _mm256_stream_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
#endif

// While one run of memory is written, memory can already be asked for what is read next: how far
// ahead that is for runs of `n` elements, whole runs and at least 8 kB; 0 for runs so long that
// the second-level cache can't hold two of them.
template <class T>
inline int64_t elements_ahead(int64_t n) {
  constexpr int64_t kNear = 8192 / sizeof(T), kFar = 32768 / sizeof(T);
  if (n <= 0 || n > kFar) return 0;
  return (kNear + n - 1) / n * n;
}

// Asks for the line at `p`, which may lie past the end of what is owned.
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// `v` with all but its last `count` lanes zero.
inline Vec last_lanes(Vec v, int64_t count) {
  struct Masks {
    int32_t lane[2 * kLanes];
    constexpr Masks() : lane() {
      for (int i = kLanes; i < 2 * kLanes; ++i) lane[i] = -1;
    }
  };
  static constexpr Masks masks;
  Bits mask;
  memcpy(&mask, masks.lane + count, sizeof mask);
  return (Vec)((Bits)v & mask);
}

// How a loop over `n` elements sees one vector of them: whole, or the first `count` lanes.
struct Whole {
  template <class T>
  Vec load(const T* p) const { return BIT_KERNELS_ISA::load(p); }
  template <bool kStream, class T>
  void store(T* p, Vec v) const {
    if (kStream)
      BIT_KERNELS_ISA::stream(p, v);
    else
      BIT_KERNELS_ISA::store(p, v);
  }
};
struct Part {
  int64_t count;
  template <class T>
  Vec load(const T* p) const { return load_first(p, count); }
  template <bool kStream, class T>
  void store(T* p, Vec v) const { store_first(p, v, count); }
};

template <class Body>
inline void for_vectors(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
  if (i < n) body(i, Part{n - i});
}

constexpr int64_t kLineBytes = 64;

// Outputs past this size are streamed to memory: they would push out of the caches what the next
// layer reads, and a plain store reads each line before it writes it.
constexpr int64_t kStreamBytes = int64_t{1} << 20;

// Elements from `p` to the next cache line.
template <class T>
inline int64_t to_line(const T* p) {
  const uintptr_t past = reinterpret_cast<uintptr_t>(p) % kLineBytes;
  return past == 0 ? 0 : static_cast<int64_t>((kLineBytes - past) / sizeof(T));
}

// y[i] = f(i) for a run. Streamed: whole lines past the cache, the rest stored.
template <bool kStream, class T, class F>
inline void write_run(T* y, int64_t n, const F& f) {
  int64_t i = 0;
  if (kStream) {
    const int64_t head = to_line(y) < n ? to_line(y) : n;
    for (; i + kLanes <= head; i += kLanes) store(y + i, f(i, Whole{}));
    if (i < head) store_first(y + i, f(i, Part{head - i}), head - i);
    i = head;
    constexpr int64_t kLine = kLineBytes / sizeof(T);
    for (; i + kLine <= n; i += kLine) {
      if constexpr (sizeof(T) == sizeof(float)) {
        for (int64_t k = 0; k < kLine; k += kLanes) stream(y + i + k, f(i + k, Whole{}));
      } else {
        for (int64_t k = 0; k < kLine; k += 2 * kLanes)
          stream(y + i + k, f(i + k, Whole{}), f(i + k + kLanes, Whole{}));
      }
    }
  }
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(i, Whole{}));
  if (i == n) return;
  // A whole vector that ends with the run is cheaper than a part of one; streamed lines stay whole.
  if (!kStream && n >= kLanes)
    store(y + n - kLanes, f(n - kLanes, Whole{}));
  else
    store_first(y + i, f(i, Part{n - i}), n - i);
}

// Calls body(of) with `of.type` the element type that `element` names.
template <class T>
struct Of {
  using type = T;
};
template <class Body>
inline void with_element(Element element, const Body& body) {
  switch (element) {
    case Element::kFloat32: return body(Of<float>{});
    case Element::kBFloat16: return body(Of<BFloat16>{});
    case Element::kFloat16: return body(Of<Float16>{});
  }
}

// Memory that a kernel needs for a moment, in whole vectors so that loads may run past the end.
struct Scratch {
  float* data;
  explicit Scratch(int64_t n) : data(new float[(n + kLanes) / kLanes * kLanes]) {}
  ~Scratch() { delete[] data; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace BIT_KERNELS_ISA
}  // namespace bit_kernels
