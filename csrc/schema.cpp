// Every schema of torch.ops.kvq, and nothing else. Letters: B batch, H query heads, G KV heads,
// L query tokens, S cache capacity, T valid tokens, D key head size, Dv value head size.
// torch_kvq/ops.py documents each op.
#include <torch/library.h>

TORCH_LIBRARY(kvq, m) {
  m.def("kv_cache_update_(Tensor(a!) cache, Tensor src, Tensor position) -> ()");
  m.def("kv_cache_update_.int(Tensor(a!) cache, Tensor src, SymInt position) -> ()");

  m.def(
      "quantize(Tensor x, str format, int group_size=0, *, Tensor? signs=None, Tensor? mean=None, "
      "str encoder='default', ScalarType? scale_dtype=None) "
      "-> (Tensor codes, Tensor scales, Tensor biases)");
  m.def(
      "quantize_into_(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) biases, Tensor x, "
      "Tensor position, str format, int group_size=0, *, Tensor? signs=None, Tensor? mean=None, "
      "str encoder='default', bool ring=False) -> ()");
  m.def(
      "quantize_into_.int(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) biases, Tensor x, "
      "SymInt position, str format, int group_size=0, *, Tensor? signs=None, Tensor? mean=None, "
      "str encoder='default', bool ring=False) -> ()");
  m.def(
      "append_(Tensor(a!) k_codes, Tensor(b!) k_scales, Tensor(c!) k_biases, "
      "Tensor(d!) v_codes, Tensor(e!) v_scales, Tensor(f!) v_biases, Tensor k, Tensor v, "
      "Tensor position, str k_format, int k_group_size, str v_format, int v_group_size, *, "
      "Tensor? k_signs=None, Tensor? v_signs=None, Tensor? k_mean=None, Tensor? v_mean=None, "
      "str k_encoder='default', str v_encoder='default', bool ring=False) -> ()");
  m.def(
      "append_.int(Tensor(a!) k_codes, Tensor(b!) k_scales, Tensor(c!) k_biases, "
      "Tensor(d!) v_codes, Tensor(e!) v_scales, Tensor(f!) v_biases, Tensor k, Tensor v, "
      "SymInt position, str k_format, int k_group_size, str v_format, int v_group_size, *, "
      "Tensor? k_signs=None, Tensor? v_signs=None, Tensor? k_mean=None, Tensor? v_mean=None, "
      "str k_encoder='default', str v_encoder='default', bool ring=False) -> ()");
  m.def(
      "dequantize(Tensor codes, Tensor scales, Tensor biases, str format, int group_size=0, *, "
      "Tensor? signs=None, Tensor? mean=None, ScalarType? dtype=None, SymInt start=0, "
      "SymInt? length=None) -> Tensor");
  m.def(
      "qdq(Tensor x, str format, int group_size=0, *, Tensor? signs=None, Tensor? mean=None, "
      "str encoder='default', ScalarType? scale_dtype=None) -> Tensor");
  m.def("hadamard(Tensor x, Tensor? signs=None, bool inverse=False) -> Tensor");
  m.def(
      "mlx_native_dequantize(Tensor codes, Tensor norms, int bits, *, Tensor? codebook=None, "
      "float scale_factor_d512=1.0, Tensor? signs=None, bool rotate_back=False, SymInt start=0, "
      "SymInt? length=None) -> Tensor");

  m.def("q4_k_quantize(Tensor w) -> Tensor");
  m.def("q4_k_dequantize(Tensor blocks, *, ScalarType? dtype=None) -> Tensor");
  m.def(
      "q4_k_gemv(Tensor x, Tensor blocks, SymInt byte_offset=0, SymInt? rows=None, *, "
      "bool exact=False) -> Tensor");
  m.def(
      "q4_k_matmul(Tensor x, Tensor blocks, SymInt byte_offset=0, SymInt? rows=None, *, "
      "bool exact=False) -> Tensor");

  m.def(
      "attention(Tensor query, Tensor k_codes, Tensor k_scales, Tensor k_biases, "
      "Tensor v_codes, Tensor v_scales, Tensor v_biases, Tensor kv_length, "
      "str k_format, int k_group_size, str v_format, int v_group_size, *, "
      "Tensor? kv_start=None, Tensor? kv_end=None, Tensor? mask=None, Tensor? sinks=None, "
      "Tensor? k_signs=None, Tensor? v_signs=None, Tensor? k_mean=None, Tensor? v_mean=None, "
      "float? scale=None, float softcap=0.0, int window=0, bool causal=True, bool ring=False) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attention.int(Tensor query, Tensor k_codes, Tensor k_scales, Tensor k_biases, "
      "Tensor v_codes, Tensor v_scales, Tensor v_biases, SymInt kv_length, "
      "str k_format, int k_group_size, str v_format, int v_group_size, *, "
      "Tensor? kv_start=None, Tensor? kv_end=None, Tensor? mask=None, Tensor? sinks=None, "
      "Tensor? k_signs=None, Tensor? v_signs=None, Tensor? k_mean=None, Tensor? v_mean=None, "
      "float? scale=None, float softcap=0.0, int window=0, bool causal=True, bool ring=False) "
      "-> (Tensor out, Tensor lse)");
}
