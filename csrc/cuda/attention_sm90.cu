// The launch of attention/dkv_sm90.cuh; compiled for sm_90a only.
#include "attention/dkv_sm90.cuh"

namespace diffmas::cuda {
namespace {

template <class T, int D>
int start(const AttentionLaunch& l, void* stream) {
  using F = Sm90Form<T, D>;
  const AttentionArgs& a = l.a;
  Sm90Launch s{};
  s.attention = l, s.tokens = F::kQueries / l.group;
  const auto of_queries = [&](TensorMap& map, const Rows& x) {
    return make_tensor_map(map, std::is_same_v<T, bf16>,
                           {x.data, a.head_dim, a.q_heads, a.n, x.stride_head, x.stride_row, l.group, s.tokens});
  };
  const auto of_pool = [&](TensorMap& map, const Rows& x) {
    return make_tensor_map(map, std::is_same_v<T, bf16>,
                           {x.data, a.head_dim, a.pool_rows, a.kv_heads, x.stride_row, x.stride_head, F::kKeys, 1});
  };
  if (of_queries(s.q, a.q) || of_queries(s.d_o, a.d_o) || of_pool(s.k_pool, a.k_pool) || of_pool(s.v_pool, a.v_pool)) return kNotServed;
  const dim3 grid(unsigned((a.pool_rows + F::kKeys - 1) / F::kKeys), unsigned(a.kv_heads));
  return launch(attention_bwd_kernel_dkv_sm90<T, D>, grid, dim3(F::kThreads), F::kBytes, stream, s);
}

}  // namespace

int dkv_on_sm90(const AttentionLaunch& l, void* stream) {
  const bool is_bf16 = l.a.q.dtype == DType::bf16;
  if (l.a.head_dim <= 64) return l.group > 128 ? kNotServed : is_bf16 ? start<bf16, 64>(l, stream) : start<f16, 64>(l, stream);
  return l.group > 64 || l.a.head_dim > 128 ? kNotServed : is_bf16 ? start<bf16, 128>(l, stream) : start<f16, 128>(l, stream);
}

}  // namespace diffmas::cuda
