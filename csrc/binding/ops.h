// The ops as the dispatcher calls them. Their schemas are in Python (diffmas/schemas.py), and so are fakes and autograd.
#pragma once
#include <tuple>

#include "tensors.h"

namespace diffmas::binding {

Tensor inject(Tensor q, Tensor k, Tensor v, Optional cos, Optional sin, Tensor slots, Optional q_weight, Optional k_weight, double eps,
              bool interleaved, Tensor k_pool, Tensor v_pool);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(Tensor dq_rot, Tensor q, Tensor k, Optional cos, Optional sin,
                                                                   Tensor slots, Optional q_weight, Optional k_weight, double eps,
                                                                   bool interleaved, Tensor dk_pool, Tensor dv_pool);

std::tuple<Tensor, Tensor> cross_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor q_indptr, Tensor seg_indptr, Tensor seg_start,
                                           Tensor seg_len, Optional seg_offset, Optional inv_freq, double scale, bool causal,
                                           bool interleaved);
Tensor cross_attention_backward(Tensor d_o, Optional dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, Tensor v_pool, Tensor q_indptr,
                                Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Optional seg_offset, Optional inv_freq, double scale,
                                bool causal, bool interleaved, Tensor dk_pool, Tensor dv_pool, Optional grad_tail, bool want_dq);

std::tuple<Tensor, Tensor> merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b);
std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(Tensor d_o, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b,
                                                                 Tensor lse_b, Tensor o, Tensor lse);

void reposition(Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved, Tensor k_pool, Tensor v_pool);
void reposition_backward(Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved, Tensor dk_pool, Tensor dv_pool);

}  // namespace diffmas::binding
