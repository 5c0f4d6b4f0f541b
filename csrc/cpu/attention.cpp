// torch.ops.kvq.attention on the CPU: checks, positions, masks; then few query rows go to the
// kernels on packed codes, many to torch's own attention over unpacked tiles.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../attention_check.h"
#include "attention_dense.h"
#include "parallel.h"
#include "rows.h"

namespace kvq::cpu {
namespace {

constexpr const char* kOp = "attention";
constexpr int64_t kSplitGranule = 64;
constexpr int64_t kLeastSplit = 256;
/// Tasks to aim for; more than cores, so that uneven ones even out.
constexpr int64_t kTasks = 64;

using OptionalTensor = std::optional<at::Tensor>;

/// The op's arguments, with kv_length's values.
struct Call : AttentionCall {
  std::vector<int64_t> length;
};

/// Which positions each batch row may see, window and causality of its queries included.
std::vector<AttentionRow> visible_rows(const Call& call) {
  const int64_t batch = call.query.size(0), queries = call.query.size(2);
  const int64_t capacity = call.k.codes.size(2);
  constexpr int64_t kFar = std::numeric_limits<int64_t>::max();
  std::vector<int64_t> start(batch, 0), end(batch, kFar);
  if (call.start) start = position_values(*call.start, batch);
  if (call.end) end = position_values(*call.end, batch);
  std::vector<AttentionRow> rows(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = call.length[b];
    TORCH_CHECK_INDEX(length >= 0, "[kvq.attention] kv_length must not be negative, got ", length);
    const int64_t bound = std::min(length, end[b]);
    TORCH_CHECK_INDEX(call.ring || bound <= capacity, "[kvq.attention] kv_length ", length,
                      call.end ? " (up to kv_end " + std::to_string(end[b]) + ")" : "",
                      " exceeds the capacity ", capacity);
    int64_t first = std::max<int64_t>(start[b], 0);
    if (call.ring) first = std::max(first, length - capacity);
    if (call.window > 0) first = std::max(first, length - queries - call.window + 1);
    rows[b] = {length, first, std::max(bound, first)};
  }
  return rows;
}

AttentionMask mask_of(const Call& call) {
  if (!call.mask) return {};
  const at::Tensor& q = call.query;
  const at::Tensor mask = call.mask->expand({q.size(0), q.size(1), q.size(2), call.mask->size(-1)});
  const int64_t size = mask.element_size();
  AttentionMask out;
  out.kind = mask.scalar_type() == at::kBool ? MaskKind::boolean : MaskKind::number;
  if (out.kind == MaskKind::number) out.dtype = float_dtype(kOp, "mask", mask.scalar_type());
  out.data = static_cast<const char*>(mask.const_data_ptr());
  out.batch_stride = mask.stride(0) * size;
  out.head_stride = mask.stride(1) * size;
  out.query_stride = mask.stride(2) * size;
  out.column_stride = mask.stride(3) * size;
  out.columns = mask.size(3);
  return out;
}

/// Blocks of query rows, splits of the tokens: from shapes and lengths alone, so that the number
/// of threads cannot change a result.
void plan(AttentionArgs& args) {
  const int64_t rows = args.queries * args.heads_per_group;
  args.block_rows = attention_block_rows(rows, args.k.layout.head_dim, args.v.layout.head_dim);
  args.row_blocks = (rows + args.block_rows - 1) / args.block_rows;
  int64_t most = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    most = std::max(most, args.rows[b].end - args.rows[b].begin);
  }
  const int64_t others = args.batch * args.groups * args.row_blocks;
  const int64_t splits = std::max<int64_t>(1, kTasks / others);
  const int64_t tokens = std::max((most + splits - 1) / splits, kLeastSplit);
  args.split_tokens = (tokens + kSplitGranule - 1) / kSplitGranule * kSplitGranule;
  args.splits = std::max<int64_t>(1, (most + args.split_tokens - 1) / args.split_tokens);
}

void run_packed(AttentionArgs& args) {
  plan(args);
  at::Tensor partial;
  if (args.splits > 1) {
    partial = at::empty({args.tasks() * args.partial_size()}, at::kFloat);
    args.partial = partial.mutable_data_ptr<float>();
  }
  // Waking threads costs more than a task of a few thousand products.
  const int64_t work =
      args.split_tokens * args.block_rows * (args.k.layout.head_dim + args.v.layout.head_dim);
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 19) / std::max<int64_t>(work, 1));
  const Kernels& kernel = kernels();
  parallel_for(args.tasks(), grain,
               [&](int64_t begin, int64_t end) { kernel.attention(args, begin, end); });
  if (args.splits == 1) return;
  const int64_t merged = args.groups * args.batch * args.row_blocks;
  parallel_for(merged, kTasks,
               [&](int64_t begin, int64_t end) { kernel.attention_merge(args, begin, end); });
}

std::tuple<at::Tensor, at::Tensor> run(const Call& call) {
  const auto [k, v] = check_attention(call, at::kCPU);
  const int64_t groups = call.k.codes.size(1);
  const std::vector<AttentionRow> rows = visible_rows(call);

  const at::Tensor& q = call.query;
  at::Tensor out = at::empty({q.size(0), q.size(1), q.size(2), v.head_dim}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};

  const at::Tensor query = q.stride(3) == 1 || q.size(3) == 1 ? q : q.contiguous();
  const OptionalTensor sinks =
      call.sinks ? OptionalTensor(call.sinks->to(at::kFloat).contiguous()) : std::nullopt;
  AttentionArgs args;
  args.k = packed_rows(kOp, call.k, call.k_format);
  args.v = packed_rows(kOp, call.v, call.v_format);
  args.query = rows_of(query);
  args.dtype = float_dtype(kOp, "query", q.scalar_type());
  args.out = static_cast<char*>(out.mutable_data_ptr());
  args.lse = lse.mutable_data_ptr<float>();
  args.rows = rows.data();
  args.batch = q.size(0);
  args.groups = groups;
  args.heads_per_group = q.size(1) / groups;
  args.queries = q.size(2);
  args.capacity = call.k.codes.size(2);
  args.window = call.window;
  args.causal = call.causal;
  args.ring = call.ring;
  args.scale = static_cast<float>(call.scale.value_or(1.0 / std::sqrt(double(q.size(3)))));
  args.softcap = static_cast<float>(call.softcap);
  args.mask = mask_of(call);
  args.sinks = data_or_null(sinks);
  args.k_signs = data_or_null(k.signs);
  args.v_signs = data_or_null(v.signs);
  args.k_mean = data_or_null(k.mean);
  args.v_mean = data_or_null(v.mean);
  if (dense_is_faster(args)) {
    run_dense(args, query, call.mask);
  } else {
    run_packed(args);
  }
  return {out, lse};
}

struct CpuAttention {
  static c10::Device device() { return at::kCPU; }

  static std::tuple<at::Tensor, at::Tensor> run(const AttentionCall& call,
                                                const at::Tensor& length) {
    return cpu::run({call, position_values(length, call.query.size(0))});
  }

  static std::tuple<at::Tensor, at::Tensor> run(const AttentionCall& call, int64_t length) {
    return cpu::run({call, std::vector<int64_t>(call.query.size(0), length)});
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(kvq, CPU, m) { register_attention<CpuAttention>(m); }

}  // namespace kvq::cpu
