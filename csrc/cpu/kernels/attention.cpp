// Attention of a few query rows on packed K and V: blocks of 64 tokens, scores, online softmax,
// weighted sums. Slabs of 32 values are unpacked into the first-level cache, then multiplied by
// every query row; scales and biases are applied to whole slabs' sums, not to values.
#include "attention.h"

#include <cmath>

#include "attention_side.h"
#include "attention_tiles.h"
#include "hadamard.h"
#include "tables.h"

namespace kvq::cpu::KVQ_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
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

/// A task's result: see AttentionArgs::partial_size.
struct Partial {
  float* sums;
  float* maximum;
  float* weight;
  int64_t rows;

  Partial(const AttentionArgs& args, float* data)
      : sums(data),
        maximum(data + args.value_slabs() * args.block_rows * kSlab),
        weight(maximum + args.block_rows),
        rows(args.block_rows) {}
  float* slab(int64_t slab, int64_t r) const { return sums + (slab * rows + r) * kSlab; }
};

/// What K's mean adds to a query's scores.
float mean_score(const AttentionArgs& args, int64_t g, const float* q) {
  if (!args.k_mean) return 0;
  const int64_t n = args.k.layout.head_dim;
  float dot = 0;
  for (int64_t i = 0; i < n; ++i) dot += q[i] * args.k_mean[g * n + i];
  return dot * args.scale;
}

/// One task's state.
template <typename Operand>
class Worker {
  using Element = typename Operand::Element;

 public:
  Worker(const AttentionArgs& args, const Task& task, float* partial)
      : args_(args),
        task_(task),
        result_(args, partial),
        k_(args.k, task.b, task.g, args.capacity, args.ring),
        v_(args.v, task.b, task.g, args.capacity, args.ring) {
    std::memset(partial, 0, args.partial_size() * sizeof(float));
    std::memset(weight_lanes_, 0, task.rows * kWidth * sizeof(float));
    std::memset(bias_lanes_, 0, task.rows * v_.groups() * kWidth * sizeof(float));
    for (int64_t r = 0; r < task.rows; ++r) {
      result_.maximum[r] = -kInfinity;
      find_visible(r);
      read_query(r);
    }
  }

  void run() {
    const AttentionRow& row = args_.rows[task_.b];
    int64_t begin = row.begin + task_.split * args_.split_tokens;
    int64_t end = begin + args_.split_tokens;
    // A block's queries are in order: the first sees furthest back, the last furthest ahead.
    const int64_t last = end_[task_.rows - 1];
    begin = begin > begin_[0] ? begin : begin_[0];
    end = end < last ? end : last;
    for (int64_t position = begin; position < end; position += kBlockTokens) {
      const int64_t left = end - position;
      tokens_ = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
      // Also past the end of the split: most often the next task goes on there.
      const int64_t after = last - position - tokens_;
      next_ = after < kBlockTokens ? after : kBlockTokens;
      score(position);
      for (int64_t r = 0; r < task_.rows; ++r) weigh(r, position);
      add_values(position);
    }
    for (int64_t r = 0; r < task_.rows; ++r) collect(r);
  }

 private:
  int64_t head(int64_t r) const {
    return task_.g * args_.heads_per_group + (task_.first_row + r) % args_.heads_per_group;
  }
  int64_t query(int64_t r) const { return (task_.first_row + r) / args_.heads_per_group; }

  void find_visible(int64_t r) {
    const AttentionRow& row = args_.rows[task_.b];
    const int64_t position = row.length - args_.queries + query(r);
    begin_[r] = row.begin;
    end_[r] = row.end;
    if (args_.window && begin_[r] < position - args_.window + 1) {
      begin_[r] = position - args_.window + 1;
    }
    if (args_.causal && end_[r] > position + 1) end_[r] = position + 1;
  }

  /// Rotated query, its sums over slabs (for biases), and what K's mean adds to a score.
  void read_query(int64_t r) {
    const int64_t n = args_.k.layout.head_dim;
    alignas(64) float q[kMaxHeadDim + kSlab];
    load_row(args_.query.at(task_.b, head(r), query(r)), args_.dtype, n, q);
    shift_[r] = mean_score(args_, task_.g, q);
    if (args_.k_signs) hadamard_row(q, n, args_.k_signs, /*inverse=*/false);
    for (int64_t i = n; i < k_.slabs() * kSlab; ++i) q[i] = 0;
    for (int slab = 0; slab < k_.slabs(); ++slab) {
      const float* from = q + slab * kSlab;
      Operand::store_query(k_.unpacker(), from, q_ + (slab * task_.rows + r) * kQueryElements);
      F total = load(from);
      for (int i = kWidth; i < kSlab; i += kWidth) total = total + load(from + i);
      q_sum_[slab * task_.rows + r] = sum(total);
    }
  }

  void score(int64_t position) {
    k_.enter(position, tokens_, next_);
    std::memset(scores_, 0, task_.rows * kBlockTokens * sizeof(float));
    for (int slab = 0; slab < k_.slabs(); ++slab) {
      const Element* q = q_ + slab * task_.rows * kQueryElements;
      const float* q_sum = q_sum_ + slab * task_.rows;
      if constexpr (Operand::kFuses) {
        if (Operand::Unpacker::fuses(task_.rows)) {
          k_.scores(slab, task_.rows, q, q_sum, scores_);
          continue;
        }
      }
      k_.columns(slab, slab_);
      for_row_tiles<4>(task_.rows, [&](auto rows, int64_t r) {
        const auto tile = !k_.has_scale() ? score_tile<Operand, rows, false, false>
                          : k_.has_bias() ? score_tile<Operand, rows, true, true>
                                          : score_tile<Operand, rows, true, false>;
        tile(slab_, q + r * kQueryElements, k_.scale(slab), k_.bias(slab), q_sum + r,
             scores_ + r * kBlockTokens);
      });
    }
  }

  /// Scores of a row to weights; rescales its sums where the maximum has risen.
  void weigh(int64_t r, int64_t position) {
    constexpr int kVectors = kBlockTokens / kWidth;
    float* scores = scores_ + r * kBlockTokens;
    F s[kVectors];
    const F scale = splat(args_.scale), shift = splat(shift_[r]), cap = splat(args_.softcap);
    for (int i = 0; i < kVectors; ++i) s[i] = fma(load(scores + i * kWidth), scale, shift);
    if (args_.softcap > 0) {
      for (F& x : s) x = cap * hyperbolic_tangent(x / cap);
    }
    const int64_t begin = begin_[r] - position, end = end_[r] - position;
    if (args_.mask.kind != MaskKind::none || begin > 0 || end < kBlockTokens) {
      for (int i = 0; i < kVectors; ++i) store(scores + i * kWidth, s[i]);
      hide(r, position, begin, end < tokens_ ? end : tokens_);
      for (int i = 0; i < kVectors; ++i) s[i] = load(scores + i * kWidth);
    }

    F top = s[0];
    for (int i = 1; i < kVectors; ++i) top = maximum(top, s[i]);
    if (any_less(splat(result_.maximum[r]), top)) raise_maximum(r, largest(top));
    // A row that sees nothing yet has no maximum to subtract; its weights are zeros all the same.
    const float highest = result_.maximum[r];
    const F base = splat(highest == -kInfinity ? 0.0f : highest);
    F total = load(weight_lanes_ + r * kWidth);
    for (int i = 0; i < kVectors; ++i) {
      const F weight = exponential(s[i] - base);
      store(scores + i * kWidth, weight);
      total = total + weight;
    }
    store(weight_lanes_ + r * kWidth, total);
  }

  /// Adds the mask, and takes scores outside [begin, end) of the block out of sight.
  void hide(int64_t r, int64_t position, int64_t begin, int64_t end) {
    float* s = scores_ + r * kBlockTokens;
    if (args_.mask.kind != MaskKind::none) add_mask(r, position, begin, end);
    for (int64_t t = 0; t < begin && t < kBlockTokens; ++t) s[t] = -kInfinity;
    for (int64_t t = end > 0 ? end : 0; t < kBlockTokens; ++t) s[t] = -kInfinity;
  }

  void raise_maximum(int64_t r, float highest) {
    const F factor = splat(std::exp(result_.maximum[r] - highest));
    const auto rescale = [&](float* p) { store(p, load(p) * factor); };
    for (int slab = 0; slab < v_.slabs(); ++slab) {
      for (int i = 0; i < kSlab; i += kWidth) rescale(result_.slab(slab, r) + i);
    }
    rescale(weight_lanes_ + r * kWidth);
    for (int g = 0; g < v_.groups(); ++g) rescale(bias_lanes_ + (g * task_.rows + r) * kWidth);
    result_.maximum[r] = highest;
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
    for (int64_t t = begin > 0 ? begin : 0; t < end; ++t) {
      const char* entry = data + (t - first) * mask.column_stride;
      if (mask.kind == MaskKind::number) {
        s[t] += load_float(entry, mask.dtype);
      } else if (!*entry) {
        s[t] = -kInfinity;
      }
    }
  }

  void add_values(int64_t position) {
    v_.enter(position, tokens_, next_);
    const int padded = Operand::Unpacker::padded_tokens(tokens_);
    for (int slab = 0; slab < v_.slabs(); ++slab) {
      if (slab == 0 || (v_.has_scale() && v_.starts_group(slab))) scale_weights(slab);
      if constexpr (Operand::kFuses) {
        if (Operand::Unpacker::fuses(task_.rows)) {
          v_.sums(slab, task_.rows, weights_, result_.slab(slab, 0));
          continue;
        }
      }
      v_.rows(slab, slab_);
      for_row_tiles<kValueRows>(task_.rows, [&](auto rows, int64_t r) {
        value_tile<Operand, rows>(slab_, weights_ + r * kWeightElements, padded,
                                  result_.slab(slab, r));
      });
    }
  }

  /// Weights times the scales of the slab's group, and sums of weights times its biases.
  void scale_weights(int slab) {
    const float* scale = v_.has_scale() ? v_.scale(slab) : nullptr;
    float* lanes = bias_lanes_ + v_.group(slab) * task_.rows * kWidth;
    for (int64_t r = 0; r < task_.rows; ++r, lanes += kWidth) {
      const float* weights = scores_ + r * kBlockTokens;
      Operand::store_weights(weights, scale, weights_ + r * kWeightElements);
      if (!v_.has_bias()) continue;
      const float* bias = v_.bias(slab);
      F total = load(lanes);
      for (int t = 0; t < kBlockTokens; t += kWidth) {
        total = fma(load(weights + t), load(bias + t), total);
      }
      store(lanes, total);
    }
  }

  /// What was kept per lane goes where it belongs.
  void collect(int64_t r) {
    result_.weight[r] = sum(load(weight_lanes_ + r * kWidth));
    for (int slab = 0; slab < v_.slabs(); ++slab) v_.unpacker().restore(result_.slab(slab, r));
    if (!v_.has_bias()) return;
    for (int slab = 0; slab < v_.slabs(); ++slab) {
      const F total = splat(sum(load(bias_lanes_ + (v_.group(slab) * task_.rows + r) * kWidth)));
      float* sums = result_.slab(slab, r);
      for (int i = 0; i < kSlab; i += kWidth) store(sums + i, load(sums + i) + total);
    }
  }

  static constexpr int kQueryElements = kSlab / Operand::kPerLane;
  static constexpr int kWeightElements = kBlockTokens / Operand::kPerLane;

  const AttentionArgs& args_;
  const Task task_;
  const Partial result_;
  Side<typename Operand::Unpacker> k_, v_;
  int tokens_ = 0;                                     ///< of the current block
  int64_t next_ = 0;                                   ///< of the block after it
  int64_t begin_[kMaxBlockRows], end_[kMaxBlockRows];  ///< visible positions of each row
  float shift_[kMaxBlockRows];                         ///< what K's mean adds to its scores
  alignas(64) Element q_[kMaxBlockFloats / Operand::kPerLane];          ///< [slab][row][32 numbers]
  alignas(64) float q_sum_[kMaxBlockFloats / kSlab];                    ///< [slab][row]
  alignas(64) Element slab_[kSlab * kBlockTokens / Operand::kPerLane];  ///< unpacked K or V
  alignas(64) float scores_[kMaxBlockRows * kBlockTokens];
  alignas(64) Element weights_[kMaxBlockRows * kWeightElements];  ///< times V's scales
  alignas(64) float weight_lanes_[kMaxBlockRows * kWidth];
  alignas(64) float bias_lanes_[kMaxBlockFloats / kSlab * kWidth];  ///< [group][row][lane]
};

/// A row's unnormalised sums (changed in place), maximum and sum of weights to its out and lse:
/// sink, inverse rotation, V's mean.
void finish_row(const AttentionArgs& args, int64_t b, int64_t h, int64_t i, float* out, float top,
                float weight) {
  const int64_t n = args.v.layout.head_dim;
  const int64_t index = (b * args.groups * args.heads_per_group + h) * args.queries + i;
  float total = weight, factor = 1;
  if (args.sinks) {
    const float sink = args.sinks[h], highest = sink > top ? sink : top;
    const float base = highest == -kInfinity ? 0.0f : highest;
    factor = std::exp(top - base);
    weight *= factor;
    total = weight + std::exp(sink - base);
    top = highest;
  }
  // Nothing visible: zeros, not 0 / 0.
  const float divisor = total == 0 ? 1.0f : total, share_of_one = factor / divisor;
  for (int64_t j = 0; j < n; ++j) out[j] *= share_of_one;
  if (args.v_signs) hadamard_row(out, n, args.v_signs, /*inverse=*/true);
  if (args.v_mean) {
    const float* mean = args.v_mean + h / args.heads_per_group * n;
    const float share = weight / divisor;
    for (int64_t j = 0; j < n; ++j) out[j] += share * mean[j];
  }
  store_row(out, args.dtype, n, args.out + index * n * dtype_size(args.dtype),
            /*saturate=*/false);
  args.lse[index] = total == 0 ? -kInfinity : top + std::log(total);
}

void finish_row(const AttentionArgs& args, const Task& task, int64_t r, const Partial& result) {
  const int64_t row = task.first_row + r;
  alignas(64) float out[kMaxHeadDim + kSlab];
  for (int64_t slab = 0; slab < args.value_slabs(); ++slab) {
    std::memcpy(out + slab * kSlab, result.slab(slab, r), kSlab * sizeof(float));
  }
  finish_row(args, task.b, task.g * args.heads_per_group + row % args.heads_per_group,
             row / args.heads_per_group, out, result.maximum[r], result.weight[r]);
}

/// Takes in a dense attention's result for one head and query of a tile.
void gather_row(const AttentionArgs& args, const AttentionTile& tile, int64_t h, int64_t i) {
  const int64_t n = args.v.layout.head_dim, bytes = n * dtype_size(args.dtype);
  const int64_t q = tile.first_query + i, head = tile.first_group * args.heads_per_group + h;
  const char* out = tile.out + h * tile.out_head_stride + i * tile.out_query_stride;
  float lse = tile.lse[h * tile.lse_head_stride + i * tile.lse_query_stride];
  if (tile.first && tile.last && !args.sinks && !args.k_mean && !args.v_signs && !args.v_mean) {
    const int64_t row =
        (tile.batch_row * args.groups * args.heads_per_group + head) * args.queries + q;
    std::memcpy(args.out + row * bytes, out, bytes);
    args.lse[row] = lse;
    return;
  }
  alignas(64) float sums[kMaxHeadDim];
  load_row(out, args.dtype, n, sums);
  const int64_t padded = args.value_slabs() * kSlab;
  float* so_far = tile.so_far + (h * tile.queries + i) * (padded + 1);
  if (!tile.first) {
    const float other = so_far[padded], top = other > lse ? other : lse;
    const float base = top == -kInfinity ? 0.0f : top;
    const float a = std::exp(lse - base), b = std::exp(other - base);
    const float total = a + b == 0 ? 1.0f : a + b, mine = a / total, theirs = b / total;
    for (int64_t j = 0; j < n; ++j) sums[j] = sums[j] * mine + so_far[j] * theirs;
    lse = base + std::log(a + b);
  }
  if (!tile.last) {
    std::memcpy(so_far, sums, n * sizeof(float));
    so_far[padded] = lse;
    return;
  }
  if (args.k_mean && lse != -kInfinity) {
    alignas(64) float query[kMaxHeadDim];
    load_row(args.query.at(tile.batch_row, head, q), args.dtype, args.k.layout.head_dim, query);
    lse += mean_score(args, head / args.heads_per_group, query);
  }
  // Normalised sums are sums whose weights add up to 1.
  finish_row(args, tile.batch_row, head, q, sums, lse, lse == -kInfinity ? 0.0f : 1.0f);
}

/// Adds row r of another split's result.
void merge_row(const Partial& mine, const Partial& other, int64_t r, int64_t slabs) {
  const float a = mine.maximum[r], b = other.maximum[r];
  const float top = b > a ? b : a, base = top == -kInfinity ? 0.0f : top;
  const float keep = std::exp(a - base), take = std::exp(b - base);
  for (int64_t slab = 0; slab < slabs; ++slab) {
    float* sums = mine.slab(slab, r);
    const float* more = other.slab(slab, r);
    for (int i = 0; i < kSlab; i += kWidth) {
      store(sums + i, fma(load(sums + i), splat(keep), load(more + i) * splat(take)));
    }
  }
  mine.weight[r] = mine.weight[r] * keep + other.weight[r] * take;
  mine.maximum[r] = top;
}

template <typename Operand>
void run_tasks(const AttentionArgs& args, int64_t begin, int64_t end) {
  alignas(64) float local[kMaxBlockFloats + 2 * kMaxBlockRows];
  for (int64_t index = begin; index < end; ++index) {
    const Task task = locate(args, index);
    float* partial = args.splits > 1 ? args.partial + index * args.partial_size() : local;
    Worker<Operand>(args, task, partial).run();
    if (args.splits > 1) continue;
    for (int64_t r = 0; r < task.rows; ++r) finish_row(args, task, r, Partial(args, partial));
  }
}

}  // namespace

void attention(const AttentionArgs& args, int64_t begin, int64_t end) {
#if defined(KVQ_BFLOAT_PAIRS)
  if (Pairs::hold(args)) return run_tasks<Pairs>(args, begin, end);
#endif
  run_tasks<Floats>(args, begin, end);
}

void attention_merge(const AttentionArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.batch * args.row_blocks;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index / blocks * args.splits * blocks + index % blocks;
    const Task task = locate(args, first);
    const Partial result(args, args.partial + first * args.partial_size());
    for (int64_t r = 0; r < task.rows; ++r) {
      for (int64_t split = 1; split < args.splits; ++split) {
        const int64_t other = first + split * blocks;
        merge_row(result, Partial(args, args.partial + other * args.partial_size()), r,
                  args.value_slabs());
      }
      finish_row(args, task, r, result);
    }
  }
}

void attention_unpack(const AttentionArgs& args, const AttentionTile& tile, int64_t begin,
                      int64_t end) {
  const int size = dtype_size(args.dtype);
  alignas(64) float values[kSlab * kBlockTokens];
  for (int64_t index = begin; index < end; ++index) {
    const bool is_key = index % 2 == 0;
    const Packed& packed = is_key ? args.k : args.v;
    const int64_t g = index / 2 % tile.groups, first = index / 2 / tile.groups * kBlockTokens;
    const int64_t n = packed.layout.head_dim, left = tile.tokens - first;
    const int tokens = static_cast<int>(left < kBlockTokens ? left : kBlockTokens);
    Side<FloatUnpacker> side(packed, tile.batch_row, tile.first_group + g, args.capacity,
                             args.ring);
    side.enter(tile.position + first, tokens, 0);
    char* out =
        (is_key ? tile.keys : tile.values) + (g * tile.capacity + first) * tile.width * size;
    for (int slab = 0; slab < side.slabs(); ++slab) {
      side.rows(slab, values);
      const int64_t columns = n - slab * kSlab < kSlab ? n - slab * kSlab : kSlab;
      for (int t = 0; t < tokens; ++t) {
        float* row = values + t * kSlab;
        char* to = out + (t * tile.width + slab * kSlab) * size;
        const F scale = splat(side.has_scale() ? side.scale(slab)[t] : 1.0f);
        const F bias = splat(side.has_bias() ? side.bias(slab)[t] : 0.0f);
        const bool direct = args.dtype == KVQ_BFLOAT16 && columns == kSlab;
        for (int i = 0; i < kSlab; i += kWidth) {
          const F x = fma(load(row + i), scale, bias);
          if (direct) {
            store_bfloat(to + 2 * i, x);
          } else {
            store(row + i, x);
          }
        }
        if (!direct) store_row(row, args.dtype, columns, to);
      }
    }
  }
}

void attention_gather(const AttentionArgs& args, const AttentionTile& tile, int64_t begin,
                      int64_t end) {
  const int64_t heads = tile.groups * args.heads_per_group;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t h = index % heads, first = index / heads * kGatherQueries;
    for (int64_t i = first; i < first + kGatherQueries && i < tile.queries; ++i) {
      gather_row(args, tile, h, i);
    }
  }
}

}  // namespace kvq::cpu::KVQ_ISA
