// Which tile serves a product of float32 on the current device, and into how many parts its depth
// is cut.
#pragma once

#include "launch.h"
#include "tensor_tile.h"

namespace prolora {

template <class Tile>
struct TileType {
  using Type = Tile;
};

// f(TileType<Tile>{}) with the tile of kCols columns that suits the device. (Code of 8.0 serves 8.6
// too, where a build has no other, so both tiles are compiled for it.)
template <int kCols, class F>
void run_on_tile(F f) {
  if (tensor_cores_pay(device_attribute(cudaDevAttrComputeCapabilityMajor, "capability"),
                       device_attribute(cudaDevAttrComputeCapabilityMinor, "capability"))) {
    return f(TileType<TensorTile<kCols>>{});
  }
  f(TileType<CudaTile<float, kCols>>{});
}

}  // namespace prolora
