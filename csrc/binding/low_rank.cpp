#include <vector>

#include "attention.h"
#include "cpu/tasks.h"
#include "ops.h"

namespace diffmas::binding {
namespace {

// Codes and their gradients, as the schemas have them.
struct Part {
  const char *z_name, *b_name;
  const Optional &z, &b, &dz, &db;
};

const Optional kNone;

// Contiguous float32 that is written to.
float* sums(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Device device) {
  return const_cast<float*>(floats(name, t, shape, device));
}

LowRankPart part_of(const Part& part, int64_t rows, int64_t kv_heads, int64_t head_dim, Device device) {
  STD_TORCH_CHECK(bool(part.z) == bool(part.b), part.z_name, ", ", part.b_name, ": expected both or neither, got one");
  if (!part.z) return {};
  STD_TORCH_CHECK(part.z->dim() == 2 && part.z->size(1) > 0, part.z_name, ": expected shape [n, r], got ", shape_of(*part.z));
  STD_TORCH_CHECK(bool(part.dz) == bool(part.db), "gradients of ", part.z_name, ", ", part.b_name, ": expected both or neither, got one");
  const int64_t rank = part.z->size(1);
  return {rank, floats(part.z_name, part.z, {rows, rank}, device), floats(part.b_name, part.b, {kv_heads * head_dim, rank}, device),
          sums("dz", part.dz, {rows, rank}, device), sums("db", part.db, {kv_heads * head_dim, rank}, device)};
}

LowRank low_rank(const AttentionArgs& a, const Tensor& seg_code, const Part& k, const Part& v, const Optional& keep, const Optional& add,
                 const Optional& cos, const Optional& sin, Device device) {
  STD_TORCH_CHECK(k.z || v.z, "z_k, z_v: expected codes of keys or values, got none");
  STD_TORCH_CHECK(!device.cuda, "q: expected tensors on the CPU");
  const int64_t rows = (k.z ? *k.z : *v.z).size(0);
  LowRank low{};
  low.k = part_of(k, rows, a.kv_heads, a.head_dim, device);
  low.v = part_of(v, rows, a.kv_heads, a.head_dim, device);
  low.code = indices("seg_code", seg_code, a.segments, device);
  for (int64_t s = 0; s < a.segments; ++s)
    STD_TORCH_CHECK(low.code[s] >= 0 && low.code[s] <= rows - a.view.length[s], "seg_code: expected codes among ", rows, ", got ",
                    low.code[s], " + ", a.view.length[s], " at ", s);
  STD_TORCH_CHECK(bool(keep) == bool(add) && bool(cos) == bool(sin), "keep and add, cos and sin: expected both or neither, got one");
  low.keep = floats("keep", keep, {rows, a.kv_heads}, device);
  low.add = floats("add", add, {rows, a.kv_heads}, device);
  if (cos) {
    low.rotary = 2 * cos->size(-1);
    STD_TORCH_CHECK(low.rotary <= a.head_dim, "cos: expected up to ", a.head_dim / 2, " pairs a row, got ", shape_of(*cos));
    low.cos = floats("cos", cos, {rows, low.rotary / 2}, device);
    low.sin = floats("sin", sin, {rows, low.rotary / 2}, device);
  }
  for (int64_t b = 0; b < a.view.batch; ++b) {
    const int64_t rows_of_q = (a.view.q_indptr[b + 1] - a.view.q_indptr[b]) * (a.q_heads / a.kv_heads);
    STD_TORCH_CHECK(rows_of_q <= cpu::kSmallQRows, "q_indptr: expected up to ", cpu::kSmallQRows, " heads of a group and sequence, got ",
                    rows_of_q, " at ", b);
  }
  return low;
}

}  // namespace

std::tuple<Tensor, Tensor> low_rank_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& seg_code,
                                              const Optional& z_k, const Optional& b_k, const Optional& z_v, const Optional& b_v,
                                              const Optional& keep, const Optional& add, const Optional& cos, const Optional& sin,
                                              const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
                                              const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale,
                                              bool interleaved) {
  AttentionArgs a =
      attention_args(q, {k_pool, v_pool}, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, false, interleaved);
  const LowRank low = low_rank(a, seg_code, {"z_k", "b_k", z_k, b_k, kNone, kNone}, {"z_v", "b_v", z_v, b_v, kNone, kNone}, keep, add,
                               cos, sin, device_of(q));
  a.low = &low;
  return forward(a, q, false);
}

Tensor low_rank_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& o, const Tensor& lse, const Tensor& k_pool,
                                   const Tensor& v_pool, const Tensor& seg_code, const Optional& z_k, const Optional& b_k,
                                   const Optional& z_v, const Optional& b_v, const Optional& keep, const Optional& add,
                                   const Optional& cos, const Optional& sin, const Tensor& q_indptr, const Tensor& seg_indptr,
                                   const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq,
                                   double scale, bool interleaved, const Optional& dz_k, const Optional& db_k, const Optional& dz_v,
                                   const Optional& db_v, const Optional& dkeep, const Optional& dadd, const Optional& dk_pool,
                                   const Optional& dv_pool) {
  const Device device = device_of(q);
  AttentionArgs a =
      attention_args(q, {k_pool, v_pool}, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, false, interleaved);
  LowRank low = low_rank(a, seg_code, {"z_k", "b_k", z_k, b_k, dz_k, db_k}, {"z_v", "b_v", z_v, b_v, dz_v, db_v}, keep, add, cos, sin,
                         device);
  if (low.k.dz && low.keep) {
    STD_TORCH_CHECK(dkeep && dadd, "dkeep, dadd: expected the gradients of keep and add, got none");
    const int64_t rows = z_k->size(0);
    low.d_keep = sums("dkeep", dkeep, {rows, a.kv_heads}, device);
    low.d_add = sums("dadd", dadd, {rows, a.kv_heads}, device);
  }
  a.low = &low;
  const Tensor grad = packed(d_o);
  a.d_o = heads("do", grad, a.n, a.q_heads, a.head_dim, device).rows;
  a.o = heads("o", o, a.n, a.q_heads, a.head_dim, device).rows;
  a.lse = const_cast<float*>(floats("lse", lse, {a.n, a.q_heads}, device));
  STD_TORCH_CHECK(bool(dk_pool) == bool(dv_pool), "dk_pool, dv_pool: expected both or neither, got one");
  if (dk_pool) {
    check_dtype("dk_pool", *dk_pool, ScalarType::Float);
    check_shape("dk_pool", *dk_pool, {a.pool_rows, a.kv_heads, a.head_dim});
    const Pools grads = pools("dk_pool", *dk_pool, "dv_pool", *dv_pool, a.kv_heads, a.head_dim, device);
    a.dk_pool = grads.k, a.dv_pool = grads.v;
  }
  Tensor dq = empty_heads(q, a.n, a.q_heads, a.head_dim, false);
  a.dq = rows_of_own(dq, a.q_heads, a.head_dim, a.q.dtype);
  Partials partials{q, {}};
  cpu::attention_backward(a, threads(), partials.workspace());
  return dq;
}

}  // namespace diffmas::binding
