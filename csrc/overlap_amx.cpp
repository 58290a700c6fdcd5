// overlap_table in the matrix tiles (AMX) of recent server processors: float32 at twice the rate of
// vector instructions.
//
// A tile multiplies [16, 32] by [32, 16] numbers of bfloat16 with sums in float32. A float32 x is
// split as x = hi + lo + rest with hi, lo in bfloat16, |lo| <= 2^-9 |x|, |rest| <= 2^-18 |x|, and
//   x y = (hi + lo)(hi + lo) + O(2^-17) |x y|:
// four products in place of one. lo lo is no larger than what is left out, but in Σ x x it is
// positive throughout: without it a subspace would share 5e-6 too little with itself. What is left
// out has random signs. Only overlaps are made so; what becomes part of a LoRA is not.
//
// Packing. The tiles read 64-byte rows in which two numbers that follow each other along the sum
// share 32 bits. A strip of 32 columns is packed step by step (32 rows of the matrix), 4 KiB each:
//   [hi of columns 0-15 | hi of 16-31 | lo of 0-15 | lo of 16-31],  1 KiB each,
// rows being pairs of the sum (right operand) or columns (left operand, the transpose of that). A
// pair of strips makes 32 x 32 entries of C in four tiles; 10 KiB are read for 16 tile products.
// Depth is taken in panels, so that four strips of either side stay in the L2 cache.
#include "overlap_amx.h"

#include <immintrin.h>
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "overlap_serial.h"

namespace prolora {
namespace {

constexpr Index kStrip = 32;        // columns packed together, and rows a step is deep
constexpr Index kStepBytes = 4096;  // of a packed step
constexpr Index kTileBytes = 1024;
constexpr Index kPanelSteps = 40;  // 1280 rows
constexpr Index kMacro = 128;      // entries of C along a side that share packed strips
constexpr Index kMacroEntries = kMacro * kMacro;

struct TileConfig {
  unsigned char palette, start_row, reserved[14];
  unsigned short bytes_per_row[16];
  unsigned char rows[16];
};

// All eight tiles as 16 rows of 64 bytes, for as long as this lives.
struct Tiles {
  Tiles() {
    alignas(64) TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes_per_row[i] = 64;
      config.rows[i] = 16;
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// x rounded to bfloat16 (half away from zero) is the upper half of this.
inline __m512i rounded(__m512 x) {
  return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
}

// 16 columns of two neighbouring rows, pair by pair: their bfloat16 halves.
inline void pack_rows(__m512 first, __m512 second, __m512i* hi, __m512i* lo) {
  const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
  const __m512i a = rounded(first);
  const __m512i b = rounded(second);
  const __m512i b_hi = _mm512_and_si512(b, upper);
  *hi = _mm512_or_si512(_mm512_srli_epi32(a, 16), b_hi);
  const __m512 a_rest = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(a, upper)));
  const __m512 b_rest = _mm512_sub_ps(second, _mm512_castsi512_ps(b_hi));
  *lo = _mm512_or_si512(_mm512_srli_epi32(rounded(a_rest), 16),
                        _mm512_and_si512(rounded(b_rest), upper));
}

// 16 x 16 numbers of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int half = 0; half < 16; half += 8) {
    for (int j = 0; j < 4; ++j) {
      t[half + j] = _mm512_shuffle_i32x4(r[half + j], r[half + j + 4], 0x88);
      t[half + j + 4] = _mm512_shuffle_i32x4(r[half + j], r[half + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// Rows [row, row + 32) of x [., k], up to `end`, to one step of every strip; zeros beyond. All
// columns at once: rows are then read from end to end.
template <bool kLeft>
void pack_step(const float* x, Index k, Index row, Index end, std::byte* out, Index strip_bytes) {
  for (Index column = 0; column < k; column += 16) {
    const __mmask16 mask = k - column >= 16 ? 0xffff : __mmask16((1u << (k - column)) - 1);
    __m512i hi[16], lo[16];
    for (int q = 0; q < 16; ++q) {
      const Index p = row + 2 * q;
      const float* at = x + p * k + column;
      pack_rows(_mm512_maskz_loadu_ps(p < end ? mask : __mmask16(0), at),
                _mm512_maskz_loadu_ps(p + 1 < end ? mask : __mmask16(0), at + k), hi + q, lo + q);
    }
    if (kLeft) {
      transpose(hi);
      transpose(lo);
    }
    std::byte* to = out + column / kStrip * strip_bytes + column % kStrip / 16 * kTileBytes;
    for (int q = 0; q < 16; ++q) {
      _mm512_store_si512(to + q * 64, hi[q]);
      _mm512_store_si512(to + q * 64 + 2 * kTileBytes, lo[q]);
    }
  }
  // The other half of the last strip.
  if ((k + 15) / 16 % 2 == 0) return;
  std::byte* to = out + k / kStrip * strip_bytes + kTileBytes;
  std::memset(to, 0, std::size_t(kTileBytes));
  std::memset(to + 2 * kTileBytes, 0, std::size_t(kTileBytes));
}

// c [32, 32] of a macro block (+)= the product of two packed strips. The small products come first.
void multiply(const std::byte* a, const std::byte* b, Index steps, float* c, bool first) {
  constexpr int kRowBytes = int(kMacro * sizeof(float));
  float* lower = c + 16 * kMacro;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, kRowBytes);
    _tile_loadd(1, c + 16, kRowBytes);
    _tile_loadd(2, lower, kRowBytes);
    _tile_loadd(3, lower + 16, kRowBytes);
  }
#define MULTIPLY_ALL       \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7)
  for (Index step = 0; step < steps; ++step, a += kStepBytes, b += kStepBytes) {
    _tile_loadd(6, b + 2 * kTileBytes, 64);
    _tile_loadd(7, b + 3 * kTileBytes, 64);
    _tile_loadd(4, a + 2 * kTileBytes, 64);
    _tile_loadd(5, a + 3 * kTileBytes, 64);
    MULTIPLY_ALL;
    _tile_loadd(4, a, 64);
    _tile_loadd(5, a + kTileBytes, 64);
    MULTIPLY_ALL;
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kTileBytes, 64);
    MULTIPLY_ALL;
    _tile_loadd(4, a + 2 * kTileBytes, 64);
    _tile_loadd(5, a + 3 * kTileBytes, 64);
    MULTIPLY_ALL;
  }
#undef MULTIPLY_ALL
  _tile_stored(0, c, kRowBytes);
  _tile_stored(1, c + 16, kRowBytes);
  _tile_stored(2, lower, kRowBytes);
  _tile_stored(3, lower + 16, kRowBytes);
}

// The memory a pair of [m, ks] and [m, kt] needs: packed panels, and the macro blocks of C that
// wait for the next panel, or one a thread where there is one panel only.
struct Workspace {
  Index strips_s, strips_t, macro_s, macro_t, panel_steps, panels, blocks;

  explicit Workspace(const OverlapGroup<float>& group, Index threads)
      : strips_s(ceil_div(group.ks, kStrip)),
        strips_t(ceil_div(group.kt, kStrip)),
        macro_s(ceil_div(group.ks, kMacro)),
        macro_t(ceil_div(group.kt, kMacro)),
        panel_steps(smaller(ceil_div(group.m, kStrip), kPanelSteps)),
        panels(group.m > 0 ? ceil_div(group.m, kPanelSteps * kStrip) : 1),
        blocks(panels > 1 ? macro_s * macro_t : threads) {}

  Index strip_bytes() const { return panel_steps * kStepBytes; }
  Index bytes() const {
    return (strips_s + strips_t) * strip_bytes() + blocks * kMacroEntries * Index(sizeof(float));
  }
};

// All blocks of one pair; `parallel`: over its strips and macro blocks.
void multiply_pair(const OverlapTableArgs<float>& args, const OverlapGroup<float>& group,
                   Index matrix, const Workspace& w, std::byte* memory, bool parallel) {
  std::byte* const left = memory;
  std::byte* const right = left + w.strips_s * w.strip_bytes();
  float* const products = reinterpret_cast<float*>(right + w.strips_t * w.strip_bytes());
  const float* us = group.us + matrix * group.m * group.ks;
  const float* ut = group.ut + matrix * group.m * group.kt;
  for (Index panel = 0; panel < w.panels; ++panel) {
    const Index row = panel * kPanelSteps * kStrip;
    const Index steps = smaller(w.panel_steps, ceil_div(group.m - row, kStrip));
#pragma omp parallel for schedule(static) if (parallel)
    for (Index step = 0; step < 2 * steps; ++step) {
      const Index t = step / 2;
      const Index from = row + t * kStrip;
      if (step % 2 == 0) {
        pack_step<true>(us, group.ks, from, group.m, left + t * kStepBytes, w.strip_bytes());
      } else {
        pack_step<false>(ut, group.kt, from, group.m, right + t * kStepBytes, w.strip_bytes());
      }
    }
#pragma omp parallel for schedule(dynamic) if (parallel)
    for (Index macro = 0; macro < w.macro_s * w.macro_t; ++macro) {
      const Index i0 = macro / w.macro_t * kMacro;
      const Index j0 = macro % w.macro_t * kMacro;
      const Index own = w.panels > 1 ? macro : parallel ? Index(omp_get_thread_num()) : 0;
      float* c = products + own * kMacroEntries;
      const Index rows = smaller(kMacro, group.ks - i0);
      const Index cols = smaller(kMacro, group.kt - j0);
      {
        const Tiles tiles;
        for (Index i = 0; i < rows; i += kStrip) {
          for (Index j = 0; j < cols; j += kStrip) {
            multiply(left + (i0 + i) / kStrip * w.strip_bytes(),
                     right + (j0 + j) / kStrip * w.strip_bytes(), steps, c + i * kMacro + j,
                     panel == 0);
          }
        }
      }
      if (panel + 1 < w.panels) continue;
      for (Index i = 0; i < rows; i += kOverlapBlock) {
        for (Index j = 0; j < cols; j += kOverlapBlock) {
          finish_block(args, group, matrix, (i0 + i) / kOverlapBlock, (j0 + j) / kOverlapBlock,
                       c + i * kMacro + j, kMacro);
        }
      }
    }
  }
}

std::byte* allocate(Index bytes) {
  return static_cast<std::byte*>(std::aligned_alloc(64, std::size_t(ceil_div(bytes, 64) * 64)));
}

}  // namespace

void overlap_table_amx(const OverlapTableArgs<float>& args) {
  const Index threads = omp_get_max_threads();
  Index pairs = 0;
  for (Index g = 0; g < args.count; ++g) pairs += args.groups[g].batch;
  // Whole pairs where every thread gets one.
  const bool within = pairs < threads;
  Index bytes = 0;
  for (Index g = 0; g < args.count; ++g) {
    const Index needed = Workspace(args.groups[g], within ? threads : 1).bytes();
    bytes = needed > bytes ? needed : bytes;
  }
  bool enough_memory = true;
#pragma omp parallel if (!within)
  {
    std::byte* memory = allocate(bytes);
    if (memory == nullptr) {
#pragma omp atomic write
      enough_memory = false;
    }
#pragma omp for schedule(dynamic)
    for (Index pair = 0; pair < pairs; ++pair) {
      if (memory == nullptr) continue;
      Index g = 0;
      Index matrix = pair;
      for (; matrix >= args.groups[g].batch; ++g) matrix -= args.groups[g].batch;
      const OverlapGroup<float>& group = args.groups[g];
      multiply_pair(args, group, matrix, Workspace(group, within ? threads : 1), memory, within);
    }
    std::free(memory);
  }
  if (!enough_memory) throw std::bad_alloc{};
  add_shells(args);
}

}  // namespace prolora
