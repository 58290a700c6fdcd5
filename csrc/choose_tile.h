// Which tile serves a product on the current device, and into how many parts its depth is cut.
#pragma once

#include <type_traits>

#include "launch.h"
#include "tensor_tile.h"

namespace prolora {

template <class Tile>
struct TileType {
  using Type = Tile;
};

// f(TileType<Tile>{}) with the tile of kCols columns that suits the device.
template <class T, int kCols, class F>
void run_on_tile(F f) {
  if constexpr (std::is_same_v<T, float>) {
    if (tensor_cores_pay(device_attribute(cudaDevAttrComputeCapabilityMajor, "capability"),
                         device_attribute(cudaDevAttrComputeCapabilityMinor, "capability"))) {
      return f(TileType<TensorTile<kCols>>{});
    }
  }
  f(TileType<CudaTile<T, kCols>>{});
}

}  // namespace prolora
