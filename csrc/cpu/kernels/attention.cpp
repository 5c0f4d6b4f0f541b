// Attention of a few query rows on packed K and V: blocks of 64 tokens, scores, online softmax,
// weighted sums. Slabs of 32 values are unpacked into the first-level cache, then multiplied by
// every query row; scales and biases are applied to whole slabs' sums, not to values.
#include "attention.h"

#include <cmath>

#include "attention_side.h"
#include "hadamard.h"
#include "tables.h"

namespace kvq::cpu::KVQ_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
/// Vectors of a tile next to each other: as many as the registers hold for 4 rows.
constexpr int kScoreVectors = kRegisters == 32 ? 4 : 2;
constexpr int kValueVectors = kRegisters == 32 && kWidth == 4 ? 4 : 2;

struct Task {
  int64_t b, g, first_row, rows, split;
};

/// Row blocks vary fastest, then batch rows, splits, groups: equal parts of the tasks are about
/// equal work also where lengths differ.
Task locate(const AttentionArgs& args, int64_t index) {
  Task task;
  task.first_row = index % args.row_blocks * args.block_rows;
  index /= args.row_blocks;
  task.b = index % args.batch;
  index /= args.batch;
  task.split = index % args.splits;
  task.g = index / args.splits;
  const int64_t rows = args.queries * args.heads_per_group;
  task.rows = rows - task.first_row < args.block_rows ? rows - task.first_row : args.block_rows;
  return task;
}

/// scores[m][64] += (q[m] . columns) * scale + q_sum[m] * bias, of one slab.
template <int Rows, bool Scale, bool Bias>
void score_tile(const float* columns, const float* q, int64_t q_stride, const float* scale,
                const float* bias, const float* q_sum, int64_t q_sum_stride, float* scores) {
  constexpr int kVectors = kScoreVectors;
  for (int t = 0; t < kBlockTokens; t += kVectors * kWidth) {
    F sums[Rows][kVectors];
    for (auto& row : sums) {
      for (F& x : row) x = splat(0.0f);
    }
    for (int d = 0; d < kSlab; ++d) {
      F k[kVectors];
      for (int v = 0; v < kVectors; ++v) k[v] = load(columns + d * kBlockTokens + t + v * kWidth);
      for (int m = 0; m < Rows; ++m) {
        const F query = splat(q[m * q_stride + d]);
        for (int v = 0; v < kVectors; ++v) sums[m][v] = fma(k[v], query, sums[m][v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const int at = t + v * kWidth;
      for (int m = 0; m < Rows; ++m) {
        float* s = scores + m * kBlockTokens + at;
        F x = load(s);
        x = Scale ? fma(sums[m][v], load(scale + at), x) : x + sums[m][v];
        if constexpr (Bias) x = fma(load(bias + at), splat(q_sum[m * q_sum_stride]), x);
        store(s, x);
      }
    }
  }
}

/// sums[m][32] += weights[m] . values + constant[m], of one slab. tokens is a multiple of 4.
template <int Rows>
void value_tile(const float* values, const float* weights, int tokens, const float* constant,
                float* sums, int64_t sums_stride) {
  // Few rows are not enough independent sums to keep the multipliers busy: split the tokens too.
  constexpr int kChains = Rows == 1 ? 4 : Rows == 2 ? 2 : 1;
  constexpr int kVectors = kValueVectors;
  for (int d = 0; d < kSlab; d += kVectors * kWidth) {
    F acc[kChains][Rows][kVectors];
    for (int m = 0; m < Rows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        acc[0][m][v] = load(sums + m * sums_stride + d + v * kWidth) + splat(constant[m]);
        for (int c = 1; c < kChains; ++c) acc[c][m][v] = splat(0.0f);
      }
    }
    for (int t = 0; t < tokens; t += kChains) {
      for (int c = 0; c < kChains; ++c) {
        F x[kVectors];
        for (int v = 0; v < kVectors; ++v) x[v] = load(values + (t + c) * kSlab + d + v * kWidth);
        for (int m = 0; m < Rows; ++m) {
          const F weight = splat(weights[m * kBlockTokens + t + c]);
          for (int v = 0; v < kVectors; ++v) acc[c][m][v] = fma(x[v], weight, acc[c][m][v]);
        }
      }
    }
    for (int m = 0; m < Rows; ++m) {
      for (int v = 0; v < kVectors; ++v) {
        F x = acc[0][m][v];
        for (int c = 1; c < kChains; ++c) x = x + acc[c][m][v];
        store(sums + m * sums_stride + d + v * kWidth, x);
      }
    }
  }
}

/// Calls f(std::integral_constant<int, 4, 2 or 1>, first row) until every row is done.
template <typename Function>
void for_row_tiles(int64_t rows, const Function& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>{}, r);
  if (r + 2 <= rows) f(std::integral_constant<int, 2>{}, r), r += 2;
  if (r < rows) f(std::integral_constant<int, 1>{}, r);
}

/// One task's state.
class Worker {
 public:
  Worker(const AttentionArgs& args, const Task& task, float* partial)
      : args_(args),
        task_(task),
        partial_(partial),
        k_(args.k, task.b, task.g, args.capacity, args.ring),
        v_(args.v, task.b, task.g, args.capacity, args.ring),
        q_stride_(k_.slabs() * kSlab),
        stride_(args.partial_row()) {
    for (int64_t r = 0; r < task.rows; ++r) {
      float* row = partial_ + r * stride_;
      std::memset(row, 0, stride_ * sizeof(float));
      row[stride_ - 2] = -kInfinity;
      read_query(r);
    }
  }

  void run() {
    const AttentionRow& row = args_.rows[task_.b];
    const int64_t split_begin = row.begin + task_.split * args_.split_tokens;
    int64_t begin = split_begin, end = split_begin + args_.split_tokens;
    end = end < row.end ? end : row.end;
    // A block's queries are in order: the first sees furthest back, the last furthest ahead.
    begin = begin > visible_begin(0) ? begin : visible_begin(0);
    end = end < visible_end(task_.rows - 1) ? end : visible_end(task_.rows - 1);
    for (int64_t position = begin; position < end; position += kBlockTokens) {
      const int64_t left = end - position;
      const int64_t after = left - kBlockTokens;
      tokens_ = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
      next_ = after < 0 ? 0 : after < kBlockTokens ? after : kBlockTokens;
      score(position);
      for (int64_t r = 0; r < task_.rows; ++r) weigh(r, position);
      add_values(position);
    }
  }

 private:
  int64_t head(int64_t r) const {
    return task_.g * args_.heads_per_group + (task_.first_row + r) % args_.heads_per_group;
  }
  int64_t query(int64_t r) const { return (task_.first_row + r) / args_.heads_per_group; }
  int64_t query_position(int64_t r) const {
    return args_.rows[task_.b].length - args_.queries + query(r);
  }
  int64_t visible_begin(int64_t r) const {
    const AttentionRow& row = args_.rows[task_.b];
    const int64_t begin = args_.window ? query_position(r) - args_.window + 1 : row.begin;
    return begin > row.begin ? begin : row.begin;
  }
  int64_t visible_end(int64_t r) const {
    const AttentionRow& row = args_.rows[task_.b];
    const int64_t end = args_.causal ? query_position(r) + 1 : row.end;
    return end < row.end ? end : row.end;
  }

  /// Rotated and scaled query, its sums over slabs (for biases), and what K's mean adds to a score.
  void read_query(int64_t r) {
    const int64_t n = args_.k.layout.head_dim;
    float* q = q_ + r * q_stride_;
    load_row(args_.query.at(task_.b, head(r), query(r)), args_.dtype, n, q);
    for (int64_t i = n; i < q_stride_; ++i) q[i] = 0;
    shift_[r] = 0;
    if (args_.k_mean) {
      const float* mean = args_.k_mean + task_.g * n;
      F dot = splat(0.0f);
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) dot = fma(load(q + i), load(mean + i), dot);
      shift_[r] = sum(dot);
      for (; i < n; ++i) shift_[r] += q[i] * mean[i];
      shift_[r] *= args_.scale;
    }
    if (args_.k_signs) hadamard_row(q, n, args_.k_signs, /*inverse=*/false);
    for (int64_t i = 0; i < q_stride_; ++i) q[i] *= args_.scale;
    for (int slab = 0; slab < k_.slabs(); ++slab) {
      F total = splat(0.0f);
      for (int i = 0; i < kSlab; i += kWidth) total = total + load(q + slab * kSlab + i);
      q_sum_[r * k_.slabs() + slab] = sum(total);
    }
  }

  void score(int64_t position) {
    k_.enter(position, tokens_);
    std::memset(scores_, 0, task_.rows * kBlockTokens * sizeof(float));
    for (int slab = 0; slab < k_.slabs(); ++slab) {
      k_.prefetch(slab, k_.slabs(), next_);
      k_.columns(slab, slab_);
      for_row_tiles(task_.rows, [&](auto rows, int64_t r) {
        const auto tile = !k_.has_scale() ? score_tile<rows, false, false>
                          : k_.has_bias() ? score_tile<rows, true, true>
                                          : score_tile<rows, true, false>;
        tile(slab_, q_ + r * q_stride_ + slab * kSlab, q_stride_, k_.scale(slab), k_.bias(slab),
             q_sum_ + r * k_.slabs() + slab, k_.slabs(), scores_ + r * kBlockTokens);
      });
    }
  }

  /// Scores of a row to weights; rescales its sums where the maximum has risen.
  void weigh(int64_t r, int64_t position) {
    float* s = scores_ + r * kBlockTokens;
    if (shift_[r] != 0) {
      for (int t = 0; t < kBlockTokens; t += kWidth) store(s + t, load(s + t) + splat(shift_[r]));
    }
    if (args_.softcap > 0) {
      const F cap = splat(args_.softcap);
      for (int t = 0; t < kBlockTokens; t += kWidth) {
        store(s + t, cap * hyperbolic_tangent(load(s + t) / cap));
      }
    }
    int64_t begin = visible_begin(r) - position, end = visible_end(r) - position;
    if (args_.mask.kind != MaskKind::none) add_mask(r, position, begin, end);
    for (int64_t t = 0; t < begin && t < kBlockTokens; ++t) s[t] = -kInfinity;
    for (int64_t t = end > 0 ? end : 0; t < kBlockTokens; ++t) s[t] = -kInfinity;

    float* sums = partial_ + r * stride_;
    float& maximum_so_far = sums[stride_ - 2];
    float& weight_so_far = sums[stride_ - 1];
    F top = load(s);
    for (int t = kWidth; t < kBlockTokens; t += kWidth) top = maximum(top, load(s + t));
    const float block_maximum = largest(top);
    if (block_maximum > maximum_so_far) {
      const float factor = std::exp(maximum_so_far - block_maximum);
      for (int64_t i = 0; i < stride_ - 2; i += kWidth) {
        store(sums + i, load(sums + i) * splat(factor));
      }
      weight_so_far *= factor;
      maximum_so_far = block_maximum;
    }
    // A row that sees nothing yet has no maximum to subtract; its weights are zeros all the same.
    const F base = splat(maximum_so_far == -kInfinity ? 0.0f : maximum_so_far);
    F total = splat(0.0f);
    for (int t = 0; t < kBlockTokens; t += kWidth) {
      const F weight = exponential(load(s + t) - base);
      store(s + t, weight);
      total = total + weight;
    }
    weight_so_far += sum(total);
  }

  /// Adds the mask to tokens [begin, end) of the block, and narrows the range to its columns.
  void add_mask(int64_t r, int64_t position, int64_t& begin, int64_t& end) {
    const AttentionMask& mask = args_.mask;
    float* s = scores_ + r * kBlockTokens;
    const int64_t origin = args_.rows[task_.b].length - mask.columns;
    const int64_t first = (origin > 0 ? origin : 0) - position;
    begin = begin > first ? begin : first;
    end = end < first + mask.columns ? end : first + mask.columns;
    const char* data = mask.data + task_.b * mask.batch_stride + head(r) * mask.head_stride +
                       query(r) * mask.query_stride;
    const int64_t stop = end < tokens_ ? end : tokens_;
    for (int64_t t = begin > 0 ? begin : 0; t < stop; ++t) {
      const char* entry = data + (t - first) * mask.column_stride;
      if (mask.kind == MaskKind::number) {
        s[t] += load_float(entry, mask.dtype);
      } else if (!*entry) {
        s[t] = -kInfinity;
      }
    }
  }

  void add_values(int64_t position) {
    v_.enter(position, tokens_);
    const int padded = (tokens_ + 3) & ~3;
    for (int slab = 0; slab < v_.slabs(); ++slab) {
      v_.prefetch(slab, v_.slabs(), next_);
      v_.rows(slab, slab_);
      if (v_.starts_group(slab)) scale_weights(slab);
      const float* weights = v_.has_scale() ? scaled_ : scores_;
      for_row_tiles(task_.rows, [&](auto rows, int64_t r) {
        value_tile<rows>(slab_, weights + r * kBlockTokens, padded, constant_ + r,
                         partial_ + r * stride_ + slab * kSlab, stride_);
      });
    }
  }

  /// Weights times the group's scales, and the sum of weights times biases.
  void scale_weights(int slab) {
    for (int64_t r = 0; r < task_.rows; ++r) {
      const float* weights = scores_ + r * kBlockTokens;
      constant_[r] = 0;
      if (!v_.has_scale()) continue;
      const float* scale = v_.scale(slab);
      for (int t = 0; t < kBlockTokens; t += kWidth) {
        store(scaled_ + r * kBlockTokens + t, load(weights + t) * load(scale + t));
      }
      if (v_.has_bias()) {
        const float* bias = v_.bias(slab);
        F total = splat(0.0f);
        for (int t = 0; t < kBlockTokens; t += kWidth) {
          total = fma(load(weights + t), load(bias + t), total);
        }
        constant_[r] = sum(total);
      }
    }
  }

  const AttentionArgs& args_;
  const Task task_;
  float* partial_;
  Side k_, v_;
  int64_t q_stride_, stride_;
  int tokens_ = 0;    ///< of the current block
  int64_t next_ = 0;  ///< of the block after it
  float q_[kMaxBlockFloats];
  float q_sum_[kMaxBlockFloats / kSlab];
  float shift_[kMaxBlockRows];
  float constant_[kMaxBlockRows];
  float slab_[kSlab * kBlockTokens];
  float scores_[kMaxBlockRows * kBlockTokens];
  float scaled_[kMaxBlockRows * kBlockTokens];
};

/// sums (in place) to the row's out and lse: sink, inverse rotation, V's mean.
void finish_row(const AttentionArgs& args, const Task& task, int64_t r, float* sums) {
  const int64_t row = task.first_row + r, n = args.v.layout.head_dim;
  const int64_t h = task.g * args.heads_per_group + row % args.heads_per_group;
  const int64_t index =
      (task.b * args.groups * args.heads_per_group + h) * args.queries + row / args.heads_per_group;
  float top = sums[args.partial_row() - 2], weight = sums[args.partial_row() - 1];
  float total = weight;
  if (args.sinks) {
    const float sink = args.sinks[h];
    const float highest = sink > top ? sink : top;
    const float base = highest == -kInfinity ? 0.0f : highest;
    const float factor = std::exp(top - base);
    for (int64_t i = 0; i < n; ++i) sums[i] *= factor;
    weight *= factor;
    total = weight + std::exp(sink - base);
    top = highest;
  }
  // Nothing visible: zeros, not 0 / 0.
  const float divisor = total == 0 ? 1.0f : total;
  for (int64_t i = 0; i < n; ++i) sums[i] /= divisor;
  if (args.v_signs) hadamard_row(sums, n, args.v_signs, /*inverse=*/true);
  if (args.v_mean) {
    const float* mean = args.v_mean + task.g * n;
    const float share = weight / divisor;
    for (int64_t i = 0; i < n; ++i) sums[i] += share * mean[i];
  }
  store_row(sums, args.dtype, n, args.out + index * n * dtype_size(args.dtype),
            /*saturate=*/false);
  args.lse[index] = total == 0 ? -kInfinity : top + std::log(total);
}

}  // namespace

void attention(const AttentionArgs& args, int64_t begin, int64_t end) {
  float local[kMaxBlockFloats];
  const int64_t stride = args.partial_row();
  for (int64_t index = begin; index < end; ++index) {
    const Task task = locate(args, index);
    float* partial = args.splits > 1 ? args.partial + index * args.block_rows * stride : local;
    Worker(args, task, partial).run();
    if (args.splits > 1) continue;
    for (int64_t r = 0; r < task.rows; ++r) finish_row(args, task, r, partial + r * stride);
  }
}

void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t stride = args.partial_row(), blocks = args.batch * args.row_blocks;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index / blocks * args.splits * blocks + index % blocks;
    const Task task = locate(args, first);
    for (int64_t r = 0; r < task.rows; ++r) {
      float* sums = args.partial + (first * args.block_rows + r) * stride;
      for (int64_t split = 1; split < args.splits; ++split) {
        const float* other =
            args.partial + ((first + split * blocks) * args.block_rows + r) * stride;
        const float a = sums[stride - 2], b = other[stride - 2];
        const float top = b > a ? b : a, base = top == -kInfinity ? 0.0f : top;
        const F mine = splat(std::exp(a - base)), theirs = splat(std::exp(b - base));
        for (int64_t i = 0; i < stride - 2; i += kWidth) {
          store(sums + i, fma(load(sums + i), mine, load(other + i) * theirs));
        }
        sums[stride - 1] =
            sums[stride - 1] * std::exp(a - base) + other[stride - 1] * std::exp(b - base);
        sums[stride - 2] = top;
      }
      finish_row(args, task, r, sums);
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
