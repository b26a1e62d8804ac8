// The launches of attention/forward_sm90.cuh, backward_sm90.cuh and dkv_sm90.cuh; compiled for sm_90a only.
#include <utility>

#include "attention/backward_sm90.cuh"
#include "attention/dkv_sm90.cuh"
#include "attention/forward_sm90.cuh"

namespace diffmas::cuda {
namespace {

// [n, Hq, D] in boxes of some tokens of a group.
int map_queries(TensorMap& map, const AttentionLaunch& l, const Rows& x, int tokens) {
  return make_tensor_map(map, x.dtype == DType::bf16,
                         {x.data, l.a.head_dim, l.a.q_heads, l.a.n, x.stride_head, x.stride_row, l.group, tokens});
}
// [Hkv, R, D] in boxes of some rows.
int map_pool(TensorMap& map, const AttentionLaunch& l, const Rows& x, int rows) {
  return make_tensor_map(map, x.dtype == DType::bf16,
                         {x.data, l.a.head_dim, l.a.pool_rows, l.a.kv_heads, x.stride_row, x.stride_head, rows, 1});
}

template <class T, int D>
int start_forward(const AttentionLaunch& l, int device, void* stream) {
  using F = ForwardForm<D>;
  const AttentionArgs& a = l.a;
  ForwardLaunch s{};
  s.attention = l, s.tokens = F::kRows / l.group, s.tiles = int(a.n / s.tokens + a.view.batch);
  int error = map_queries(s.q, l, a.q, s.tokens);
  for (auto [maps, pool] : {std::pair{&s.k_pool, &a.k_pool}, std::pair{&s.v_pool, &a.v_pool}})
    error = error || map_pool(maps->tile, l, *pool, kStreamedKeys) || map_pool(maps->quad, l, *pool, kQuadKeys) ||
            map_pool(maps->group, l, *pool, kGroupKeys);
  if (error) return kNotServed;
  const dim3 grid(unsigned(min(s.tiles * a.kv_heads, int64_t(processors(device)))));
  return launch(attention_fwd_kernel_sm90<T, D>, grid, dim3(F::kThreads), F::kBytes, stream, s);
}

// How much of everything the backward has; panels of a head.
struct BackwardCounts {
  int64_t tiles, places, blocks;

  BackwardCounts(const AttentionLaunch& l, int64_t panels)
      : tiles(l.a.n / (BackwardForm<64>::kQueries / l.group) + l.a.view.batch),
        places(tiles * l.a.kv_heads * panels),
        blocks((l.a.pool_rows + kBlockRows - 1) / kBlockRows) {}
};

template <class T, int D>
int start_backward(const AttentionLaunch& l, void* stream) {
  using F = BackwardForm<D>;
  const AttentionArgs& a = l.a;
  const BackwardCounts counts(l, F::kPanels);
  BackwardLaunch s{};
  s.attention = l, s.tokens = F::kQueries / l.group;
  s.sums = l.parts, s.begun = l.counters, s.marks = l.counters + 1;
  s.readers = {reinterpret_cast<BlockReader*>(s.sums + counts.places * F::kSums), a.view, int(counts.blocks)};
  if (map_queries(s.q, l, a.q, s.tokens) || map_queries(s.d_o, l, a.d_o, s.tokens) || map_pool(s.k_pool, l, a.k_pool, F::kKeys) ||
      map_pool(s.v_pool, l, a.v_pool, F::kKeys))
    return kNotServed;
  const dim3 readers_grid(unsigned((counts.blocks * a.view.batch + kReadersThreads - 1) / kReadersThreads));
  if (const int error = launch(attention_bwd_kernel_readers, readers_grid, dim3(kReadersThreads), 0, stream, s.readers)) return error;
  const dim3 grid(unsigned(counts.blocks * a.kv_heads)), sums_grid(unsigned(counts.tiles), unsigned(a.kv_heads));
  if (const int error = launch(attention_bwd_kernel_sm90<T, D>, grid, dim3(F::kThreads), F::kBytes, stream, s)) return error;
  return launch(attention_bwd_kernel_dq_sums<T, D>, sums_grid, dim3(kSumsThreads), 0, stream, s);
}

template <class T, int D>
int start_dkv(const AttentionLaunch& l, void* stream) {
  using F = Sm90Form<T, D>;
  const AttentionArgs& a = l.a;
  Sm90Launch s{};
  s.attention = l, s.tokens = F::kQueries / l.group;
  if (map_queries(s.q, l, a.q, s.tokens) || map_queries(s.d_o, l, a.d_o, s.tokens) || map_pool(s.k_pool, l, a.k_pool, F::kKeys) ||
      map_pool(s.v_pool, l, a.v_pool, F::kKeys))
    return kNotServed;
  const dim3 grid(unsigned((a.pool_rows + F::kKeys - 1) / F::kKeys), unsigned(a.kv_heads));
  return launch(attention_bwd_kernel_dkv_sm90<T, D>, grid, dim3(F::kThreads), F::kBytes, stream, s);
}

}  // namespace

int forward_on_sm90(const AttentionLaunch& l, int device, void* stream) {
  const bool is_bf16 = l.a.q.dtype == DType::bf16;
  if (l.group > 128 || l.a.head_dim > 128 || !(l.a.scale > 0)) return kNotServed;
  if (l.a.head_dim <= 64) return is_bf16 ? start_forward<bf16, 64>(l, device, stream) : start_forward<f16, 64>(l, device, stream);
  return is_bf16 ? start_forward<bf16, 128>(l, device, stream) : start_forward<f16, 128>(l, device, stream);
}

AttentionSizes backward_sizes_on_sm90(const AttentionLaunch& l) {
  if (l.group > BackwardForm<64>::kQueries || l.a.head_dim > 128) return {0, 0};
  const BackwardCounts counts(l, l.a.head_dim <= 64 ? 1 : 2);
  const int64_t readers = counts.blocks * l.a.view.batch * int64_t(sizeof(BlockReader) / sizeof(float));
  return {counts.places * BackwardForm<64>::kSums + readers, 1 + counts.places};
}

int backward_on_sm90(const AttentionLaunch& l, void* stream) {
  const bool is_bf16 = l.a.q.dtype == DType::bf16;
  if (l.group > BackwardForm<64>::kQueries || l.a.head_dim > 128) return kNotServed;
  if (l.a.head_dim <= 64) return is_bf16 ? start_backward<bf16, 64>(l, stream) : start_backward<f16, 64>(l, stream);
  return is_bf16 ? start_backward<bf16, 128>(l, stream) : start_backward<f16, 128>(l, stream);
}

int dkv_on_sm90(const AttentionLaunch& l, void* stream) {
  const bool is_bf16 = l.a.q.dtype == DType::bf16;
  if (l.a.head_dim <= 64) return l.group > 128 ? kNotServed : is_bf16 ? start_dkv<bf16, 64>(l, stream) : start_dkv<f16, 64>(l, stream);
  return l.group > 64 || l.a.head_dim > 128 ? kNotServed : is_bf16 ? start_dkv<bf16, 128>(l, stream) : start_dkv<f16, 128>(l, stream);
}

}  // namespace diffmas::cuda
