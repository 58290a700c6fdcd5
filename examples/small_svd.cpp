// The singular values of a stack of small matrices, from C++ alone:
//   cmake -S . -B build -DPROLORA_LIBRARY=ON && cmake --build build && build/small_svd
#include <cmath>
#include <cstdio>
#include <vector>

#include "ops.h"

int main() {
  constexpr prolora::Index batch = 3, m = 5, n = 4;
  // Matrix b has 10 (b + 1), ..., b + 1 on its diagonal, and zeros beside it.
  std::vector<double> a(batch * m * n, 0.0), u(batch * m * n), s(batch * n), v(batch * n * n);
  for (prolora::Index b = 0; b < batch; ++b) {
    for (prolora::Index i = 0; i < n; ++i) a[(b * m + i) * n + i] = double(b + 1) * (10 - 3 * i);
  }
  prolora::SmallSvdArgs<double> args{};
  args.a = a.data(), args.u = u.data(), args.s = s.data(), args.v = v.data();
  args.batch = batch, args.m = m, args.n = n;
  prolora::small_svd_cpu(args);
  for (prolora::Index b = 0; b < batch; ++b) {
    for (prolora::Index i = 0; i < n; ++i) {
      std::printf("%g ", s[b * n + i]);
      if (std::abs(s[b * n + i] - double(b + 1) * (10 - 3 * i)) > 1e-12) return 1;
    }
    std::printf("\n");
  }
  return 0;
}
