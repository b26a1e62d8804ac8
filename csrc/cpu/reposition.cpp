#include "reposition.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/kernels.h"
#include "parallel.h"

namespace diffmas::cpu {
namespace {

// The rotations of a call, one per distinct offset. Angles in float64: offsets reach 1e5 and more.
struct OffsetTables {
  std::vector<int64_t> rotation;  // [m]
  std::vector<float> cos, sin;    // [rotations, Dr]

  explicit OffsetTables(RepositionArgs& args) : rotation(size_t(args.m)) {
    std::vector<int64_t> offsets(args.offset, args.offset + args.m);
    std::sort(offsets.begin(), offsets.end());
    offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
    for (int64_t i = 0; i < args.m; ++i) rotation[i] = std::lower_bound(offsets.begin(), offsets.end(), args.offset[i]) - offsets.begin();
    const int64_t half = args.half_rotary, step = args.interleaved ? 2 : 1, other = args.interleaved ? 1 : half;
    cos.resize(offsets.size() * 2 * half), sin.resize(cos.size());
    for (size_t s = 0; s < offsets.size(); ++s)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(offsets[s]) * double(args.inv_freq[i]);
        const size_t at = s * 2 * half + i * step;
        cos[at] = cos[at + other] = float(std::cos(angle));
        sin[at] = sin[at + other] = float(std::sin(angle));
      }
    args.rotation = rotation.data(), args.cos = cos.data(), args.sin = sin.data();
  }
};

}  // namespace

void reposition(RepositionArgs args, const Threads& threads) {
  const OffsetTables tables(args);
  const int64_t work = 3 * args.kv_heads * args.head_dim;
  for_each_chunk(threads, args.m, work, [&](int64_t begin, int64_t end) { kernels().reposition(args, begin, end); });
}

void reposition_backward(RepositionArgs args, const Threads& threads) {
  const OffsetTables tables(args);
  for_each_task(threads, args.kv_heads, [&](int64_t head) { kernels().reposition_backward(args, head); });
}

}  // namespace diffmas::cpu
