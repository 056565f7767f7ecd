// AMX: one instruction adds 32 bfloat16 products to each of 16 by 16 sums.
#include "product_tiles.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace fastprompt {
namespace {

// GCC's intrinsics do not say what memory a tile, or a configuration, is loaded from.
inline void all_is_written() { asm volatile("" ::: "memory"); }

// All eight tiles at their full size, for as long as this lives; then as they were, for whoever has
// a configuration of his own on this thread.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t config[64] = {1};  // the palette; 8 x 64 bytes a row from 16, rows from 48
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
    all_is_written();
    _tile_loadconfig(config);
  }
  ~Tiles() {
    all_is_written();
    _tile_loadconfig(before_);
  }

 private:
  alignas(64) uint8_t before_[64];
};

// sums (+)= left times right, of Down by Across tiles; those of sums are `down` and `across` apart.
template <bool Two, bool Wide>
void multiply_tiles(Side left, Side right, int64_t steps, bool add, float* sums, int64_t down,
                    int64_t across) {
  constexpr int kRow = 64;
  all_is_written();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if (add) {
    _tile_loadd(0, sums, kRow);
    if (Wide) _tile_loadd(1, sums + across, kRow);
    if (Two) _tile_loadd(2, sums + down, kRow);
    if (Two && Wide) _tile_loadd(3, sums + down + across, kRow);
  }
  for (int64_t s = 0; s < steps; ++s, left.data += kTileSize, right.data += kTileSize) {
    _tile_loadd(4, left.data, kRow);
    _tile_loadd(6, right.data, kRow);
    _tile_dpbf16ps(0, 4, 6);
    if (Wide) {
      _tile_loadd(7, right.data + right.next, kRow);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Two) {
      _tile_loadd(5, left.data + left.next, kRow);
      _tile_dpbf16ps(2, 5, 6);
      if (Wide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kRow);
  if (Wide) _tile_stored(1, sums + across, kRow);
  if (Two) _tile_stored(2, sums + down, kRow);
  if (Two && Wide) _tile_stored(3, sums + down + across, kRow);
}

}  // namespace
}  // namespace fastprompt

#include "product_panels.h"

namespace fastprompt {
namespace {

bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bf16) || !(d & tile)) return false;
  // Linux gives the tiles' registers to a process that asks for them
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace

Multiplier find_amx() {
  return has_amx() ? Multiplier{"amx", arrange, multiply, true} : Multiplier{};
}

}  // namespace fastprompt
#else
fastprompt::Multiplier fastprompt::find_amx() { return {}; }
#endif
