// The ops as the dispatcher calls them. Their schemas are in Python (diffmas/ops/schemas.py), and so are fakes and autograd.
#pragma once
#include <tuple>
#include <vector>

#include "tensors.h"

namespace diffmas::binding {

Tensor inject(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos, const Optional& sin, const Tensor& slots,
              const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
              const Tensor& v_pool);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(const Tensor& dq_rot, const Tensor& q, const Tensor& k,
                                                                   const Optional& cos, const Optional& sin, const Tensor& slots,
                                                                   const Optional& q_weight, const Optional& k_weight, double eps,
                                                                   bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool);

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr,
                                           const Tensor& seg_indptr, const Tensor& seg_start, const Tensor& seg_len,
                                           const Optional& seg_offset, const Optional& inv_freq, double scale, bool causal,
                                           bool interleaved);
// The same over all of each view, rows of 8 bits that get no gradient; the backward on the CPU.
std::tuple<Tensor, Tensor> cross_attention_quantized(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& k_scale,
                                                     const Tensor& v_scale, const Tensor& q_indptr, const Tensor& seg_indptr,
                                                     const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                                     const Optional& inv_freq, double scale, bool interleaved);
Tensor cross_attention_quantized_backward(const Tensor& d_o, const Tensor& q, const Tensor& o, const Tensor& lse, const Tensor& k_pool,
                                          const Tensor& v_pool, const Tensor& k_scale, const Tensor& v_scale, const Tensor& q_indptr,
                                          const Tensor& seg_indptr, const Tensor& seg_start, const Tensor& seg_len,
                                          const Optional& seg_offset, const Optional& inv_freq, double scale, bool interleaved);
Tensor cross_attention_backward(const Tensor& d_o, const Optional& dlse, const Tensor& q, const Tensor& o, const Tensor& lse,
                                const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                                const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq,
                                double scale, bool causal, bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool,
                                const Optional& grad_tail, bool want_dq);

// inject, cross_attention and inject_backward for heads in either layout (see Heads), of n tokens: the ops below are made of them. flat: the
// layout of what comes out. dq_weight, dk_weight [D] float32: take the weights' gradients, where they are asked for.
Tensor inject_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t n, int64_t head_dim, const Optional& cos,
                    const Optional& sin, const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps,
                    bool interleaved, const Tensor& k_pool, const Tensor& v_pool);
std::tuple<Tensor, Tensor, Tensor> inject_heads_backward(const Tensor& dq_rot, const Tensor& q, const Tensor& k, int64_t n,
                                                         int64_t head_dim, bool flat, const Optional& cos, const Optional& sin,
                                                         const Tensor& slots, const Optional& q_weight, const Optional& k_weight,
                                                         double eps, bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool,
                                                         const Optional& dq_weight, const Optional& dk_weight);
std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr,
                                  const Tensor& seg_indptr, const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                  const Optional& inv_freq, double scale, bool causal, bool interleaved, bool flat);

// inject and causal cross_attention over the rows' views in one call, and their backward.
std::tuple<Tensor, Tensor, Tensor> inject_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos,
                                                 const Optional& sin, const Tensor& slots, const Optional& q_weight,
                                                 const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
                                                 const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                                                 const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                                 const Optional& inv_freq, double scale);
std::tuple<Tensor, Tensor, Tensor, Optional, Optional> inject_attend_backward(
    const Tensor& d_o, const Tensor& q_rot, const Tensor& o, const Tensor& lse, const Optional& q, const Optional& k, const Optional& cos,
    const Optional& sin, const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved,
    const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
    const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale, const Tensor& dk_pool,
    const Tensor& dv_pool, const Optional& grad_tail, bool weight_grads);

// Of few query rows, over rows with low-rank parts (common/low_rank.h); what is there of the gradients is added to.
std::tuple<Tensor, Tensor> low_rank_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& seg_code,
                                              const Optional& z_k, const Optional& b_k, const Optional& z_v, const Optional& b_v,
                                              const Optional& keep, const Optional& add, const Optional& cos, const Optional& sin,
                                              const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
                                              const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale,
                                              bool interleaved);
Tensor low_rank_attention_backward(const Tensor& d_o, const Tensor& q, const Tensor& o, const Tensor& lse, const Tensor& k_pool,
                                   const Tensor& v_pool, const Tensor& seg_code, const Optional& z_k, const Optional& b_k,
                                   const Optional& z_v, const Optional& b_v, const Optional& keep, const Optional& add,
                                   const Optional& cos, const Optional& sin, const Tensor& q_indptr, const Tensor& seg_indptr,
                                   const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq,
                                   double scale, bool interleaved, const Optional& dz_k, const Optional& db_k, const Optional& dz_v,
                                   const Optional& db_v, const Optional& dkeep, const Optional& dadd, const Optional& dk_pool,
                                   const Optional& dv_pool);

// y and LoRA's u (cpu/linear.h); a, b: both or neither.
std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& a, const Optional& b,
                                  double scale, bool transposed);
// Decoder layers on few rows x [1, n, hidden], from one's x to the next one's. A layer has two norms, each with an eps, and the linears
// q, k, v, o, gate, up and down: of each its weight, bias, a and b, the last three where `parts` has 1 for a bias and 2 for a and b, with
// as many a, b and scales as there are ends, where the rows of several adapters end (none: one has all rows); the
// norms of its heads, of q and k, where there are any; pools, whose rows `slots` it writes; and 4 tensors of quantised rows, where there are
// some: K, V and their scales. View, rest and frozen_view: q_indptr, seg_indptr, seg_start, seg_len and maybe seg_offset; rest: what queries
// see beside a view that all of them see; empty for none.
//
// learning: it returns beside y what the backward needs (layers.h).
std::vector<Tensor> few_rows_layers(const Tensor& x, std::vector<Tensor> norms, std::vector<double> eps, std::vector<Tensor> linears,
                                    std::vector<int64_t> parts, std::vector<double> scales, std::vector<int64_t> ends, const Optional& cos,
                                    const Optional& sin, const Tensor& slots, std::vector<Tensor> head_norms, double head_eps, bool interleaved,
                                    std::vector<Tensor> k_pools, std::vector<Tensor> v_pools, std::vector<Tensor> view,
                                    std::vector<Tensor> rest, const Optional& inv_freq, double scale, std::vector<Tensor> frozen,
                                    std::vector<Tensor> frozen_view, bool learning);
// Returns dx; of all layers together do [L, 1, n, Hq * D]; and what the gradients of adapters that `parts` calls waiting (4) need of the
// backward, rows and floats. kept: what the forward returned beside y. own_rows_only: of each layer, whether dK and dV of the newest rows
// alone change, of which `tail` has the number in each sequence of the rest or, without one, of the view; no_tail: in the view before a rest.
std::vector<Tensor> few_rows_layers_backward(const Tensor& dy, const Tensor& x, std::vector<Tensor> kept, std::vector<Tensor> norms,
                                             std::vector<double> eps, std::vector<Tensor> linears, std::vector<int64_t> parts,
                                             std::vector<double> scales, std::vector<int64_t> ends, const Optional& cos,
                                             const Optional& sin, const Tensor& slots,
                                             std::vector<Tensor> head_norms, double head_eps, bool interleaved, std::vector<Tensor> k_pools,
                                             std::vector<Tensor> v_pools, std::vector<Tensor> view, std::vector<Tensor> rest,
                                             const Optional& inv_freq, double scale, std::vector<Tensor> frozen,
                                             std::vector<Tensor> frozen_view, std::vector<Tensor> dk_pools, std::vector<Tensor> dv_pools,
                                             std::vector<int64_t> own_rows_only, const Tensor& tail, const Optional& no_tail);
// The gradients of a and b of each waiting adapter, from all steps of a run, the last one first: o, rows and floats as the forward left
// them, rows and floats as the backward did.
std::vector<Tensor> few_rows_lora_grads(std::vector<Tensor> norms, std::vector<double> eps, std::vector<Tensor> linears,
                                        std::vector<int64_t> parts, std::vector<double> scales, std::vector<int64_t> ends, std::vector<Tensor> os,
                                        std::vector<Tensor> xs, std::vector<Tensor> us, std::vector<Tensor> dys, std::vector<Tensor> vs);
// What stands between a layer's linears, for rows [n, length], and its gradients (cpu/linear.h).
Tensor norm(const Tensor& x, const Tensor& weight, double eps);
Tensor norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double eps);
Tensor gate(const Tensor& gate, const Tensor& up);
std::tuple<Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& gate, const Tensor& up);
Tensor add_lora(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, bool transposed);
Tensor lora_grad(const Tensor& c, const Tensor& z, double scale);

std::tuple<Tensor, Tensor> merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b);
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(Tensor d_o, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b,
                                                                 Tensor lse_b, Tensor o, Tensor lse);

void reposition(Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved, Tensor k_pool, Tensor v_pool);
void reposition_backward(Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved, Tensor dk_pool, Tensor dv_pool);

}  // namespace diffmas::binding
