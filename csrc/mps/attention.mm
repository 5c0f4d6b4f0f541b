// attention on MPS: few query rows go to the decode kernel, many to the prefill kernel; either
// splits the tokens where rows alone would not fill the GPU, and a merge pass follows.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "../attention_check.h"
#include "../shared/attention_params.h"
#include "attention_library.h"
#include "rows.h"
#include "tuning.h"

namespace kvq::mps {
namespace {

constexpr const char* kOp = "attention";

/// Beyond this head size the prefill kernel's tiles do not fit, nor eight rows of decode.
constexpr int64_t kPrefillDim = 256;
constexpr int64_t kWideDim = 512;

/// Most tokens of a split of the matrix kernel, as far as there may be so many splits: sums that
/// run on for longer lose bits on a GPU whose matrix products truncate them (benchmarks/NOTES.md).
constexpr int64_t kMatrixTokens = 1 << 15;

AttentionFormat attention_format(const Packed& packed, const Format& format) {
  const at::Tensor& typed = format.is_none() ? packed.codes : packed.scales;
  const bool grouped = format.family == KVQ_FAMILY_AFFINE || format.family == KVQ_FAMILY_FP8_E4M3 ||
                       format.family == KVQ_FAMILY_FP8_E5M2;
  return {format.family, format.bits, grouped ? format.group : 0,
          float_dtype(kOp, "codes", typed.scalar_type()), format.name};
}

int64_t byte_stride(const at::Tensor& t, int64_t dim) {
  return t.size(dim) > 1 ? t.stride(dim) * t.element_size() : 0;
}

/// Whether rows start at multiples of what the kernel's widest loads need: the power of two in the
/// length of a row, at most 16.
bool is_aligned(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  const int64_t size = t.element_size(), row = t.size(3) * size;
  const int64_t needed = std::min<int64_t>(16, row & -row);
  int64_t all = t.storage_offset() * size;
  for (int64_t dim = 0; dim < 3; ++dim) all |= byte_stride(t, dim);
  return all % needed == 0;
}

bool is_aligned(const Packed& packed) {
  return is_aligned(packed.codes) && is_aligned(packed.scales) && is_aligned(packed.biases);
}

uint32_t token_stride(const at::Tensor& t) {
  const int64_t stride = byte_stride(t, 2);
  TORCH_CHECK_VALUE(stride < (int64_t{1} << 32),
                    "[kvq.attention] slots must be less than 4 GiB "
                    "apart, got ",
                    stride, " bytes");
  return static_cast<uint32_t>(stride);
}

KvqAttentionSide side_params(const Packed& packed, const Side& side) {
  const at::Tensor &codes = packed.codes, &scales = packed.scales, &biases = packed.biases;
  return {byte_stride(codes, 0),  byte_stride(codes, 1),  byte_stride(scales, 0),
          byte_stride(scales, 1), byte_stride(biases, 0), byte_stride(biases, 1),
          token_stride(codes),    token_stride(scales),   token_stride(biases),
          side.signs.has_value(), side.mean.has_value(),  0};
}

/// A bound that is a tensor, as the kernel reads it.
struct Bound {
  KvqAttentionBound params;
  at::Tensor tensor;
};

Bound value_bound(int64_t value) { return {{value, KVQ_BOUND_VALUE, 0}, {}}; }

Bound tensor_bound(const at::Tensor& t) {
  const uint32_t kind = t.scalar_type() == at::kInt ? KVQ_BOUND_INT32 : KVQ_BOUND_INT64;
  return {{0, kind, t.dim() == 0 ? 0u : 1u}, t.contiguous()};
}

Bound optional_bound(const OptionalTensor& t, int64_t otherwise) {
  return t ? tensor_bound(*t) : value_bound(otherwise);
}

void set_mask(KvqAttentionParams& p, const AttentionCall& call) {
  if (!call.mask) return;
  const at::Tensor& q = call.query;
  const at::Tensor mask = call.mask->expand({q.size(0), q.size(1), q.size(2), call.mask->size(-1)});
  p.mask_batch = mask.stride(0);
  p.mask_head = mask.stride(1);
  p.mask_query = mask.stride(2);
  p.mask_column = mask.stride(3);
  p.mask_columns = mask.size(3);
  p.mask_kind = mask.scalar_type() == at::kBool    ? KVQ_MASK_BOOL
                : mask.scalar_type() == at::kFloat ? KVQ_MASK_FLOAT32
                : mask.scalar_type() == at::kHalf  ? KVQ_MASK_FLOAT16
                                                   : KVQ_MASK_BFLOAT16;
}

AttentionKernel choose_kernel(const AttentionCall& call, const AttentionSides& sides, int64_t rows,
                              const AttentionTuning& tuned) {
  AttentionKernel kernel{KVQ_ATTENTION_MATRIX,
                         float_dtype(kOp, "query", call.query.scalar_type()),
                         attention_format(call.k, call.k_format),
                         attention_format(call.v, call.v_format),
                         static_cast<int>(sides.k.head_dim),
                         static_cast<int>(sides.v.head_dim),
                         static_cast<int>(tuned.matrix),
                         is_aligned(call.k) && is_aligned(call.v)};
  if (tuned.matrix != 0 && kernel.fits_matrix()) return kernel;
  const int64_t dim = sides.k.head_dim, value_dim = sides.v.head_dim;
  const int64_t widest = std::max(dim, value_dim);
  const bool tiles = widest <= kPrefillDim && dim % 8 == 0 && value_dim % 8 == 0;
  // Where the prefill kernel is wanted but its tiles do not fit, the widest that decode has.
  const int64_t wanted = tuned.tile == 0 ? KVQ_DECODE_ROWS : tuned.tile;
  const int64_t most =
      std::min<int64_t>(wanted, widest <= kWideDim ? KVQ_DECODE_ROWS : KVQ_DECODE_ROWS / 2);
  kernel.kind = tiles && tuned.tile == 0 ? KVQ_ATTENTION_PREFILL : KVQ_ATTENTION_DECODE;
  kernel.rows =
      static_cast<int>(std::min<int64_t>(most, std::bit_ceil(static_cast<uint64_t>(rows))));
  return kernel;
}

/// Threads of a merge threadgroup: one simdgroup where it reads all splits at once and there are
/// rows enough to keep the GPU busy.
int64_t merge_threads(int64_t rows, int64_t splits) {
  return splits <= 16 && rows > 256 ? 32 : KVQ_ATTENTION_THREADS;
}

std::tuple<at::Tensor, at::Tensor> run(const AttentionCall& call, const Bound& length,
                                       std::optional<int64_t> known_length) {
  const AttentionSides sides = check_attention(call, kDevice);
  const at::Tensor& q = call.query;
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2);
  const int64_t groups = call.k.codes.size(1), capacity = call.k.codes.size(2);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(capacity <= kMost && queries * heads <= kMost,
                    "[kvq.attention] capacity and query rows must be below 2^31, got ", capacity,
                    " and ", queries * heads);
  if (known_length) {
    TORCH_CHECK_INDEX(*known_length >= 0, "[kvq.attention] kv_length must not be negative, got ",
                      *known_length);
    TORCH_CHECK_INDEX(call.ring || call.end || *known_length <= capacity,
                      "[kvq.attention] kv_length ", *known_length, " exceeds the capacity ",
                      capacity);
  }
  at::Tensor out = at::empty({batch, heads, queries, sides.v.head_dim}, q.options());
  at::Tensor lse = at::empty({batch, heads, queries}, q.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};

  const at::Tensor query = q.stride(3) == 1 || q.size(3) == 1 ? q : q.contiguous();
  const at::Tensor sinks = call.sinks ? call.sinks->to(at::kFloat).contiguous() : at::Tensor();
  const Bound start = optional_bound(call.start, 0);
  const Bound end = optional_bound(call.end, std::numeric_limits<int64_t>::max());
  KvqAttentionParams p{};
  p.k = side_params(call.k, sides.k);
  p.v = side_params(call.v, sides.v);
  p.kv_length = length.params;
  p.kv_start = start.params;
  p.kv_end = end.params;
  p.query_batch = query.stride(0);
  p.query_head = query.stride(1);
  p.query_token = query.stride(2);
  // Beyond any position, but far from overflow.
  p.window = std::min<int64_t>(call.window, int64_t{1} << 62);
  p.heads = static_cast<uint32_t>(heads);
  p.groups = static_cast<uint32_t>(groups);
  p.queries = static_cast<uint32_t>(queries);
  p.repeat = static_cast<uint32_t>(heads / groups);
  p.capacity = static_cast<uint32_t>(capacity);
  p.value_dim = static_cast<uint32_t>(sides.v.head_dim);
  p.causal = call.causal;
  p.ring = call.ring;
  p.has_sinks = sinks.defined();
  p.magic = KVQ_MAGIC_BITS;
  p.scale = static_cast<float>(call.scale.value_or(1.0 / std::sqrt(double(q.size(3)))));
  p.softcap = static_cast<float>(call.softcap);
  set_mask(p, call);

  const int64_t rows = queries * (heads / groups);
  const TuningTable table = tuning();
  const AttentionTuning& tuned = find_tuning(table, rows);
  const AttentionKernel kernel = choose_kernel(call, sides, rows, tuned);
  const int64_t tile = kernel.kind == KVQ_ATTENTION_PREFILL ? KVQ_PREFILL_ROWS : kernel.rows;
  const int64_t tiles = (rows + tile - 1) / tile, tasks = tiles * batch * groups;
  int64_t tokens = std::min(known_length.value_or(capacity), capacity);
  if (call.window > 0 && call.window < tokens) tokens = std::min(tokens, call.window + queries);
  const int64_t wanted = std::min(tuned.threadgroups / tasks, tokens / tuned.split_tokens);
  const int64_t needed =
      kernel.kind == KVQ_ATTENTION_MATRIX ? (tokens + kMatrixTokens - 1) / kMatrixTokens : 1;
  p.splits = static_cast<uint32_t>(
      std::clamp<int64_t>(std::max(wanted, needed), 1, KVQ_ATTENTION_MAX_SPLITS));
  const at::Tensor partial =
      p.splits > 1 ? at::empty({lse.numel() * p.splits * (sides.v.head_dim + 2)}, lse.options())
                   : at::Tensor();

  const runtime::Launch launch{
      .library = kernel.library(),
      .kernel = kernel.name(),
      .instantiation = kernel.instantiation(),
      .buffers = {query, call.k.codes, call.k.scales, call.k.biases, call.v.codes, call.v.scales,
                  call.v.biases, length.tensor, start.tensor, end.tensor, or_none(call.mask), sinks,
                  or_none(sides.k.signs), or_none(sides.v.signs), or_none(sides.k.mean),
                  or_none(sides.v.mean), out, lse, partial},
      .params = p,
      .threadgroups = {p.splits, tiles, batch * groups},
      .threads_per_threadgroup = {KVQ_ATTENTION_THREADS},
  };
  if (p.splits == 1) {
    runtime::dispatch(launch);
    return {out, lse};
  }
  const runtime::Launch merge{
      .library = "attention_merge",
      .kernel = std::string("kvq_attention_merge_") + metal_type(kernel.dtype),
      .buffers = {partial, sinks, or_none(sides.v.signs), or_none(sides.v.mean), out, lse},
      .params = p,
      .threadgroups = {queries, heads, batch},
      .threads_per_threadgroup = {merge_threads(lse.numel(), p.splits)},
  };
  runtime::dispatch({launch, merge});
  return {out, lse};
}

struct MpsAttention {
  static c10::Device device() { return kDevice; }

  static std::tuple<at::Tensor, at::Tensor> run(const AttentionCall& call,
                                                const at::Tensor& length) {
    return mps::run(call, tensor_bound(length), std::nullopt);
  }

  static std::tuple<at::Tensor, at::Tensor> run(const AttentionCall& call, int64_t length) {
    return mps::run(call, value_bound(length), length);
  }
};

TORCH_LIBRARY_IMPL(kvq, MPS, m) { register_attention<MpsAttention>(m); }

}  // namespace
}  // namespace kvq::mps
