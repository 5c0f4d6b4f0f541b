#include "attention_dense.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "parallel.h"

namespace kvq::cpu {
namespace {

// Workspace, small enough that the allocator keeps it from call to call: fresh pages cost more than
// what is written to them.
constexpr int64_t kQueryBytes = int64_t{4} << 20;  ///< queries of some KV heads, their results
constexpr int64_t kTileBytes = int64_t{8} << 20;   ///< unpacked K and V
constexpr int64_t kMaskBytes = int64_t{16} << 20;
constexpr int64_t kQueryBlock = 2048;
constexpr int64_t kHadamardGrain = 64;
/// Query rows of a KV head from which a fast dense product makes up for unpacking.
constexpr int64_t kDenseRows = 64;
constexpr float kMasked = -std::numeric_limits<float>::infinity();

/// The dense attention of one block of queries of some KV heads of one batch row.
class Block {
 public:
  /// where says which; query is those queries as [H, queries, width], rotated; keys and values are
  /// room for a tile, [G, most tokens, width].
  Block(const AttentionArgs& args, const AttentionTile& where, const at::Tensor& query,
        const std::optional<at::Tensor>& mask, const at::Tensor& keys, const at::Tensor& values)
      : args_(args),
        row_(args.rows[where.batch_row]),
        tile_(where),
        query_(query),
        mask_(mask),
        keys_(keys),
        values_(values) {
    const int64_t first = tile_.first_query, queries = tile_.queries;
    tile_.width = query.size(2);
    first_position_ = row_.length - args.queries + first;
    begin_ = row_.begin;
    end_ = row_.end;
    if (args.causal) end_ = std::min(end_, first_position_ + queries);
    if (args.window) begin_ = std::max(begin_, first_position_ - args.window + 1);
    if (mask) {
      origin_ = std::max<int64_t>(0, row_.length - mask->size(-1));
      begin_ = std::max(begin_, origin_);
      end_ = std::min(end_, origin_ + mask->size(-1));
    }
  }

  void run() {
    if (begin_ >= end_) return write_nothing();
    // The tokens of the queries themselves make a square tile: no mask tensor, half the work.
    const int64_t last_position = first_position_ + tile_.queries - 1;
    const bool square = args_.causal && !mask_ && begin_ <= first_position_ &&
                        end_ == last_position + 1 && tile_.queries <= keys_.size(1) &&
                        (!args_.window || args_.window >= tile_.queries);
    const int64_t past = square ? first_position_ : end_;
    for (int64_t position = begin_; position < past;) {
      const int64_t tokens = std::min(past - position, keys_.size(1));
      attend(position, tokens, /*square=*/false, !square && position + tokens == end_);
      position += tokens;
    }
    if (square) attend(first_position_, tile_.queries, /*square=*/true, /*last=*/true);
  }

 private:
  void attend(int64_t position, int64_t tokens, bool square, bool last) {
    tile_.position = position;
    tile_.tokens = tokens;
    tile_.last = last;
    unpack();
    const int64_t groups = tile_.groups, shared = args_.heads_per_group, width = tile_.width;
    const at::Tensor k = keys_.narrow(0, 0, groups).narrow(1, 0, tokens).unsqueeze(1);
    const at::Tensor v = values_.narrow(0, 0, groups).narrow(1, 0, tokens).unsqueeze(1);
    const auto scale = static_cast<double>(args_.scale);
    std::optional<at::Tensor> mask;
    if (!square && needs_mask()) mask = mask_tile();
    if (square || (mask && mask->size(1) > 1)) {
      auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
          query_.unsqueeze(0), k.transpose(0, 1), v.transpose(0, 1), 0.0, square, mask, scale);
      return gather(out.squeeze(0), visible_lse(lse, mask).squeeze(0));
    }
    // One long list of rows per KV head: K and V are read once for all its heads.
    const int64_t rows = shared * tile_.queries;
    if (mask) mask = mask->expand({1, shared, -1, -1}).reshape({1, 1, rows, tokens});
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        query_.view({groups, 1, rows, width}), k, v, 0.0, false, mask, scale);
    gather(out.reshape({groups * shared, tile_.queries, width}),
           visible_lse(lse, mask).reshape({groups * shared, tile_.queries}));
  }

  /// Rows that see nothing come back with some finite log-sum-exp.
  static at::Tensor visible_lse(const at::Tensor& lse, const std::optional<at::Tensor>& mask) {
    if (!mask) return lse;
    return lse.masked_fill((mask->amax(-1) == kMasked).expand_as(lse), kMasked);
  }

  void unpack() {
    tile_.keys = static_cast<char*>(keys_.data_ptr());
    tile_.values = static_cast<char*>(values_.data_ptr());
    tile_.capacity = keys_.size(1);
    const int64_t blocks = (tile_.tokens + 63) / 64;
    parallel_for(blocks * tile_.groups * 2, 1, [&](int64_t begin, int64_t end) {
      kernels().attention_unpack(args_, tile_, begin, end);
    });
  }

  /// Whether some query of the block does not see some token of the tile.
  bool needs_mask() const {
    const int64_t last_query = first_position_ + tile_.queries - 1;
    return mask_ || (args_.causal && tile_.position + tile_.tokens - 1 > first_position_) ||
           (args_.window && tile_.position <= last_query - args_.window);
  }

  /// [1, H or 1, queries, tokens], float32, to be added to scores.
  at::Tensor mask_tile() const {
    const auto positions = [](int64_t first, int64_t count) {
      return at::arange(first, first + count, at::kLong);
    };
    const at::Tensor distance = positions(first_position_, tile_.queries).unsqueeze(1) -
                                positions(tile_.position, tile_.tokens);
    at::Tensor hidden = at::zeros(distance.sizes(), at::kBool);
    if (args_.causal) hidden = distance.lt(0);
    if (args_.window) hidden = hidden.logical_or(distance.ge(args_.window));
    at::Tensor added = at::zeros(distance.sizes(), at::kFloat);
    if (mask_) {
      at::Tensor given = *mask_;
      while (given.dim() < 4) given = given.unsqueeze(0);
      given = given.narrow(0, given.size(0) > 1 ? tile_.batch_row : 0, 1);
      if (given.size(1) > 1) {
        const int64_t shared = args_.heads_per_group;
        given = given.narrow(1, tile_.first_group * shared, tile_.groups * shared);
      }
      if (given.size(2) > 1) given = given.narrow(2, tile_.first_query, tile_.queries);
      given = given.narrow(3, tile_.position - origin_, tile_.tokens);
      if (given.scalar_type() == at::kBool) {
        hidden = hidden.logical_or(given.logical_not());
      } else {
        added = given.to(at::kFloat);
      }
    }
    added = added.masked_fill(hidden, kMasked);
    while (added.dim() < 4) added = added.unsqueeze(0);
    return added;
  }

  /// Takes in a tile's out [H, queries, width] and lse [H, queries].
  void gather(const at::Tensor& out, const at::Tensor& lse) {
    const int64_t heads = tile_.groups * args_.heads_per_group;
    tile_.out = static_cast<const char*>(out.const_data_ptr());
    tile_.out_head_stride = out.stride(0) * out.element_size();
    tile_.out_query_stride = out.stride(1) * out.element_size();
    tile_.lse = lse.const_data_ptr<float>();
    tile_.lse_head_stride = lse.stride(0);
    tile_.lse_query_stride = lse.stride(1);
    if (!tile_.last && !so_far_.defined()) {
      so_far_ = at::empty({heads * tile_.queries, args_.value_slabs() * 32 + 1}, at::kFloat);
      tile_.so_far = so_far_.mutable_data_ptr<float>();
    }
    const int64_t blocks = (tile_.queries + kGatherQueries - 1) / kGatherQueries;
    parallel_for(heads * blocks, 1, [&](int64_t begin, int64_t end) {
      kernels().attention_gather(args_, tile_, begin, end);
    });
    tile_.first = false;
  }

  void write_nothing() {
    const int64_t heads = tile_.groups * args_.heads_per_group;
    gather(at::zeros({1, 1, tile_.width}, query_.options()).expand({heads, tile_.queries, -1}),
           at::full({1, 1}, kMasked, at::kFloat).expand({heads, tile_.queries}));
  }

  const AttentionArgs& args_;
  const AttentionRow& row_;
  AttentionTile tile_;
  const at::Tensor& query_;
  const std::optional<at::Tensor>& mask_;
  const at::Tensor &keys_, &values_;
  at::Tensor so_far_;
  int64_t first_position_;  ///< of the block's first query
  int64_t begin_, end_;     ///< positions that some query of the block may see
  int64_t origin_ = 0;      ///< position of the mask's first column
};

/// The block's queries as [H, queries, width]: rotated as K is, padded with zeros.
at::Tensor stored_query(const AttentionArgs& args, const AttentionTile& where,
                        const at::Tensor& query, int64_t width) {
  const int64_t shared = args.heads_per_group;
  at::Tensor q = query.select(0, where.batch_row)
                     .narrow(0, where.first_group * shared, where.groups * shared)
                     .narrow(1, where.first_query, where.queries)
                     .contiguous();
  if (args.k_signs) {
    const at::Tensor rotated = at::empty_like(q);
    HadamardArgs hadamard;
    hadamard.x = q.const_data_ptr();
    hadamard.out = rotated.data_ptr();
    hadamard.dtype = args.dtype;
    hadamard.head_dim = q.size(2);
    hadamard.signs = args.k_signs;
    parallel_for(q.size(0) * q.size(1), kHadamardGrain,
                 [&](int64_t begin, int64_t end) { kernels().hadamard(hadamard, begin, end); });
    q = rotated;
  }
  return q.size(2) == width ? q : at::constant_pad_nd(q, {0, width - q.size(2)});
}

}  // namespace

bool dense_is_faster(const AttentionArgs& args) {
  bool fast = false;
#if defined(__APPLE__)
  fast = args.dtype == KVQ_FLOAT32;  // Accelerate has the processor's matrix unit
#elif defined(__x86_64__)
  fast = args.dtype == KVQ_BFLOAT16 && __builtin_cpu_supports("amx-bf16");
#endif
  return fast && args.softcap == 0 && args.queries * args.heads_per_group >= kDenseRows;
}

void run_dense(const AttentionArgs& args, const at::Tensor& query,
               const std::optional<at::Tensor>& mask) {
  const int64_t k_dim = args.k.layout.head_dim, v_dim = args.v.layout.head_dim;
  const int64_t width = std::max(k_dim, v_dim), groups = args.groups;
  int64_t longest = 1;
  for (int64_t b = 0; b < args.batch; ++b) {
    longest = std::max(longest, args.rows[b].end - args.rows[b].begin);
  }
  const int64_t size = query.element_size(), shared = args.heads_per_group;
  int64_t block = std::min(args.queries, kQueryBlock);
  const int64_t chunk =
      std::clamp<int64_t>(kQueryBytes / (shared * block * width * size), 1, groups);
  const int64_t most = std::clamp<int64_t>(kTileBytes / (2 * chunk * width * size), 256, 8192);
  const int64_t tile = std::min(most, longest);
  block = std::min(block, tile);
  if (mask || args.window) {
    const int64_t heads = mask && mask->dim() >= 3 && mask->size(-3) > 1 ? chunk * shared : 1;
    block =
        std::clamp<int64_t>(kMaskBytes / (4 * heads * tile), std::min<int64_t>(32, block), block);
  }
  // Zeros fill what is beyond the narrower of K and V.
  const at::Tensor both = at::empty({2, chunk, tile, width}, query.options());
  if (k_dim != v_dim) both.zero_();
  const at::Tensor keys = both[0], values = both[1];
  AttentionTile where;
  for (where.batch_row = 0; where.batch_row < args.batch; ++where.batch_row) {
    for (where.first_group = 0; where.first_group < groups; where.first_group += chunk) {
      where.groups = std::min(chunk, groups - where.first_group);
      for (where.first_query = 0; where.first_query < args.queries; where.first_query += block) {
        where.queries = std::min(block, args.queries - where.first_query);
        const at::Tensor q = stored_query(args, where, query, width);
        Block(args, where, q, mask, keys, values).run();
      }
    }
  }
}

}  // namespace kvq::cpu
