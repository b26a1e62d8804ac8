// The arguments of cross_attention and its backward, from stdin.
#pragma once
#include "common/attention.h"
#include "tensors.h"

namespace diffmas::host {

inline Rows rows(const Tensors& t, const char* name) {
  if (!t.has(name)) return {};
  const std::string& dtype = t.dtype(name);
  return {t.data(name), t.stride(name, 0), t.stride(name, 1),
          dtype == "float32"    ? DType::f32
          : dtype == "bfloat16" ? DType::bf16
          : dtype == "int8"     ? DType::i8
          : dtype == "float16"  ? DType::f16
                                : DType::e4m3};
}

inline Scales scales(const Tensors& t, const char* name) {
  if (!t.has(name)) return {};
  return {t.data<float>(name), t.stride(name, 0), t.stride(name, 1)};
}

inline AttentionArgs attention_args(const Tensors& t) {
  AttentionArgs a{};
  a.n = t.size("q", 0), a.q_heads = t.size("q", 1), a.head_dim = t.size("q", 2);
  a.pool_rows = t.size("k_pool", 0), a.kv_heads = t.size("k_pool", 1), a.segments = t.size("seg_start", 0);
  a.view.batch = t.size("q_indptr", 0) - 1;
  a.view.q_indptr = t.data<int64_t>("q_indptr"), a.view.seg_indptr = t.data<int64_t>("seg_indptr");
  a.view.start = t.data<int64_t>("seg_start"), a.view.length = t.data<int64_t>("seg_len"), a.view.offset = t.data<int64_t>("seg_offset");
  a.view.inv_freq = t.data<float>("inv_freq"), a.view.half_rotary = t.has("inv_freq") ? t.size("inv_freq", 0) : 0;
  a.view.grad_tail = t.data<int64_t>("grad_tail"), a.view.causal = t.number("causal");
  a.q = rows(t, "q"), a.k_pool = rows(t, "k_pool"), a.v_pool = rows(t, "v_pool"), a.o = rows(t, "o");
  a.lse = t.data<float>("lse"), a.scale = float(t.number("scale")), a.interleaved = t.number("interleaved");
  a.d_o = rows(t, "do"), a.dlse = t.data<float>("dlse"), a.dq = rows(t, "dq");
  a.k_scale = scales(t, "k_scale"), a.v_scale = scales(t, "v_scale");
  a.dk_pool = rows(t, "dk_pool"), a.dv_pool = rows(t, "dv_pool");
  return a;
}

}  // namespace diffmas::host
