#include "check.h"

#include <ATen/ops/tensor.h>

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "shared/codebooks.h"

namespace kvq {

void check_input(const char* op, const char* argument, const at::Tensor& x, c10::Device device) {
  float_dtype(op, argument, x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 4, "[kvq.", op, "] ", argument, " must have 4 dimensions, got ",
                    x.dim());
  TORCH_CHECK_VALUE(x.device() == device, "[kvq.", op, "] ", argument, " must be on ", device,
                    ", got ", x.device());
  TORCH_CHECK_VALUE(x.size(3) <= kMaxHeadDim, "[kvq.", op, "] ", argument, " has head_dim ",
                    x.size(3), "; at most ", kMaxHeadDim, " is supported");
}

void check_packed(const char* op, const char* prefix, const Packed& packed, const Format& format) {
  const auto& [codes, scales, biases] = packed;
  TORCH_CHECK_VALUE(codes.dim() == 4 && scales.dim() == 4 && biases.dim() == 4, "[kvq.", op, "] ",
                    prefix, "codes, scales and biases must have 4 dimensions, got ", codes.dim(),
                    ", ", scales.dim(), " and ", biases.dim());
  if (format.is_none()) {
    float_dtype(op, "codes of format none", codes.scalar_type());
  } else {
    TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte, "[kvq.", op, "] ", prefix, "codes of ",
                     format.str(), " must be uint8, got ", codes.scalar_type());
  }
  float_dtype(op, "scales", scales.scalar_type());
  TORCH_CHECK_TYPE(scales.scalar_type() == biases.scalar_type(), "[kvq.", op, "] ", prefix,
                   "scales and biases must have one dtype, got ", scales.scalar_type(), " and ",
                   biases.scalar_type());
  const int64_t head_dim = format.head_dim(codes.size(3));
  TORCH_CHECK_VALUE(head_dim > 0 && format.codes_row(head_dim) == codes.size(3) &&
                        head_dim % format.multiple == 0 && head_dim <= kMaxHeadDim,
                    "[kvq.", op, "] ", prefix, "codes rows of ", codes.size(3),
                    " elements fit no head_dim of ", format.str());
  const int64_t expected[] = {format.scales_row(head_dim), format.biases_row(head_dim)};
  const at::Tensor* others[] = {&scales, &biases};
  const char* names[] = {"scales", "biases"};
  for (int i = 0; i < 2; ++i) {
    const at::Tensor& t = *others[i];
    TORCH_CHECK_VALUE(t.size(0) == codes.size(0) && t.size(1) == codes.size(1) &&
                          t.size(2) == codes.size(2) && t.size(3) == expected[i],
                      "[kvq.", op, "] ", prefix, names[i], " must be [", codes.size(0), ", ",
                      codes.size(1), ", ", codes.size(2), ", ", expected[i], "] to match codes of ",
                      format.str(), ", got ", t.sizes());
    TORCH_CHECK_VALUE(t.device() == codes.device(), "[kvq.", op, "] ", prefix, names[i],
                      " must be on ", codes.device(), ", got ", t.device());
  }
  for (const at::Tensor* t : {&codes, &scales, &biases}) {
    TORCH_CHECK_VALUE(t->size(3) <= 1 || t->stride(3) == 1, "[kvq.", op, "] ", prefix,
                      "codes, scales and biases must have contiguous rows, got strides ",
                      t->strides());
  }
}

void check_rotation_and_mean(const char* op, const char* prefix, Side& side, int64_t heads,
                             const std::optional<at::Tensor>& signs,
                             const std::optional<at::Tensor>& mean, c10::Device device) {
  if (signs) {
    TORCH_CHECK_VALUE(signs->dim() == 1 && signs->size(0) == side.head_dim, "[kvq.", op, "] ",
                      prefix, "signs must be [", side.head_dim, "], got ", signs->sizes());
    TORCH_CHECK_TYPE(signs->scalar_type() == at::kFloat, "[kvq.", op, "] ", prefix,
                     "signs must be float32, got ", signs->scalar_type());
    TORCH_CHECK_VALUE(signs->device() == device, "[kvq.", op, "] ", prefix, "signs must be on ",
                      device, ", got ", signs->device());
    side.signs = signs->contiguous();
  }
  if (mean) {
    TORCH_CHECK_VALUE(mean->dim() == 2 && mean->size(0) == heads && mean->size(1) == side.head_dim,
                      "[kvq.", op, "] ", prefix, "mean must be [", heads, ", ", side.head_dim,
                      "], got ", mean->sizes());
    TORCH_CHECK_TYPE(mean->scalar_type() == at::kFloat, "[kvq.", op, "] ", prefix,
                     "mean must be float32, got ", mean->scalar_type());
    TORCH_CHECK_VALUE(mean->device() == device, "[kvq.", op, "] ", prefix, "mean must be on ",
                      device, ", got ", mean->device());
    side.mean = mean->contiguous();
  }
}

void check_append(const char* op, const char* prefix, const at::Tensor& x, const Packed& packed,
                  const Format& format) {
  const int64_t head_dim = format.head_dim(packed.codes.size(3));
  TORCH_CHECK_VALUE(x.size(0) == packed.codes.size(0), "[kvq.", op, "] ", prefix, " batch ",
                    x.size(0), " does not match the cache's ", packed.codes.size(0));
  TORCH_CHECK_VALUE(x.size(1) == packed.codes.size(1), "[kvq.", op, "] ", prefix, " heads ",
                    x.size(1), " do not match the cache's ", packed.codes.size(1));
  TORCH_CHECK_VALUE(x.size(3) == head_dim, "[kvq.", op, "] ", prefix, " head_dim ", x.size(3),
                    " does not match the cache's ", head_dim);
}

void check_positions(const char* op, const char* argument, const at::Tensor& position,
                     int64_t batch, c10::Device device) {
  const auto dtype = position.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kLong || dtype == at::kInt, "[kvq.", op, "] ", argument,
                   " must be int64 or int32, got ", dtype);
  TORCH_CHECK_VALUE(position.dim() == 0 || (position.dim() == 1 && (position.size(0) == batch)),
                    "[kvq.", op, "] ", argument, " must be a scalar or [", batch, "], got ",
                    position.sizes());
  TORCH_CHECK_VALUE(position.device() == device, "[kvq.", op, "] ", argument, " must be on ",
                    device, ", got ", position.device());
}

void check_capacity(const char* op, at::IntArrayRef positions, int64_t tokens, int64_t capacity,
                    bool ring) {
  for (const int64_t position : positions) {
    TORCH_CHECK_INDEX(position >= 0, "[kvq.", op, "] position must not be negative, got ",
                      position);
    // Compared without a sum that could overflow.
    const int64_t end = ring ? std::numeric_limits<int64_t>::max() : capacity;
    TORCH_CHECK_INDEX(position <= end - tokens, "[kvq.", op, "] position ", position, " + ", tokens,
                      " tokens exceed the capacity ", end);
  }
  TORCH_CHECK_INDEX(tokens == 0 || capacity > 0, "[kvq.", op, "] the cache has capacity 0");
}

namespace {

/// A tensor's memory as runs of `width` bytes at byte strides. A contiguous last dimension is one
/// run; dimensions of one element, or expanded ones, have stride 0.
struct Runs {
  explicit Runs(const at::Tensor& t)
      : tensor(t), begin(static_cast<const char*>(t.const_data_ptr())), empty(t.numel() == 0) {
    const int64_t size = t.element_size();
    const at::IntArrayRef sizes = t.sizes(), steps = t.strides();
    width = steps[3] == 1 ? sizes[3] * size : size;
    for (int k = 0; k < 4; ++k) {
      const bool folded = sizes[k] == 1 || (k == 3 && steps[k] == 1);
      strides[k] = folded ? 0 : steps[k] * size;
      counts[k] = strides[k] == 0 ? 1 : sizes[k];
      last += strides[k] * (counts[k] - 1);
    }
  }
  const char* end() const { return begin + last + width; }

  const at::Tensor& tensor;
  const char* begin;
  bool empty;
  int64_t width = 0, last = 0;  ///< bytes of a run; offset of the last run
  std::array<int64_t, 4> strides{}, counts{};
};

/// One dimension that two tensors share.
struct SharedDim {
  int64_t stride, count_a, count_b;
};

/// Whether b - a, `offset` bytes now, can become an overlap by steps along dims[k...].
bool meets(const std::vector<SharedDim>& dims, size_t k, int64_t offset, const Runs& a,
           const Runs& b) {
  if (k == dims.size()) return -b.width < offset && offset < a.width;
  const auto [stride, count_a, count_b] = dims[k];
  // What the inner dimensions add is smaller than a stride, so only two steps can lead to 0.
  const int64_t down = -offset / stride - (-offset % stride < 0 ? 1 : 0);
  for (const int64_t step : {down, down + 1}) {
    if (-count_a < step && step < count_b && meets(dims, k + 1, offset + step * stride, a, b)) {
      return true;
    }
  }
  return false;
}

/// Whether two tensors of rank 4 share a byte: exact for tensors and views of one buffer
/// whose strides agree; where strides cannot be compared, intersecting ranges count as overlap.
bool overlaps(const Runs& a, const Runs& b) {
  if (a.empty || b.empty || a.end() <= b.begin || b.end() <= a.begin) return false;
  // Elsewhere than on the CPU a data pointer is a handle, comparable within one storage only.
  if (!a.tensor.is_cpu() && !a.tensor.storage().is_alias_of(b.tensor.storage())) return false;
  std::vector<SharedDim> dims;
  for (int k = 0; k < 4; ++k) {
    if (a.strides[k] && b.strides[k] && a.strides[k] != b.strides[k]) return true;
    const int64_t stride = std::max(a.strides[k], b.strides[k]);
    if (stride) dims.push_back({stride, a.counts[k], b.counts[k]});
  }
  std::sort(dims.begin(), dims.end(),
            [](const SharedDim& x, const SharedDim& y) { return x.stride > y.stride; });
  int64_t inner = std::max(a.width, b.width);
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->stride < inner) return true;
    inner += dim->stride * (std::max(dim->count_a, dim->count_b) - 1);
  }
  return meets(dims, 0, b.begin - a.begin, a, b);
}

/// Whether two indices of one tensor of rank 4 can address the same byte.
bool overlaps_itself(const Runs& runs) {
  if (runs.empty || runs.tensor.is_contiguous()) return false;
  std::array<int, 4> order{0, 1, 2, 3};
  std::sort(order.begin(), order.end(),
            [&](int x, int y) { return runs.strides[x] < runs.strides[y]; });
  int64_t inner = runs.width;
  for (const int k : order) {
    if (runs.tensor.size(k) > 1 && runs.tensor.stride(k) == 0) return true;
    if (runs.strides[k] == 0) continue;
    if (runs.strides[k] < inner) return true;
    inner += runs.strides[k] * (runs.counts[k] - 1);
  }
  return false;
}

}  // namespace

void check_no_overlap(const char* op, c10::ArrayRef<Named> written, c10::ArrayRef<Named> read) {
  c10::SmallVector<Runs, 8> runs;
  for (const auto& named : written) runs.emplace_back(named.tensor);
  for (const auto& named : read) runs.emplace_back(named.tensor);
  for (size_t i = 0; i < written.size(); ++i) {
    TORCH_CHECK_VALUE(!overlaps_itself(runs[i]), "[kvq.", op, "] ", written[i].name,
                      " is written and must not overlap itself (expanded?)");
    for (size_t j = i + 1; j < runs.size(); ++j) {
      if (!overlaps(runs[i], runs[j])) continue;
      TORCH_CHECK_VALUE(j >= written.size(), "[kvq.", op, "] ", written[i].name, " and ",
                        written[j].name, " are written and must not share memory");
      TORCH_CHECK_VALUE(false, "[kvq.", op, "] ", written[i].name,
                        " is written and must not share memory with ",
                        read[j - written.size()].name);
    }
  }
}

int64_t check_range(const char* op, int64_t start, std::optional<int64_t> length,
                    int64_t capacity) {
  TORCH_CHECK_INDEX(start >= 0 && start <= capacity, "[kvq.", op, "] start must be in [0, ",
                    capacity, "], got ", start);
  const int64_t tokens = length.value_or(capacity - start);
  TORCH_CHECK_INDEX(tokens >= 0, "[kvq.", op, "] length must not be negative, got ", tokens);
  TORCH_CHECK_INDEX(tokens <= capacity - start, "[kvq.", op, "] start ", start, " + length ",
                    tokens, " exceeds the capacity ", capacity);
  return tokens;
}

namespace {

/// This project's centroids; mlx-native's own tables differ at 6 and 8 bits.
at::Tensor default_codebook(int64_t bits) {
  const float* table = bits == 4   ? kvq_codebook_4
                       : bits == 5 ? kvq_codebook_5
                       : bits == 6 ? kvq_codebook_6
                                   : kvq_codebook_8;
  return at::tensor(at::ArrayRef<float>(table, size_t{1} << bits));
}

}  // namespace

MlxNative check_mlx_native(const at::Tensor& codes, const at::Tensor& norms, int64_t bits,
                           const std::optional<at::Tensor>& codebook, double scale_factor_d512,
                           const std::optional<at::Tensor>& signs, int64_t start,
                           std::optional<int64_t> length) {
  const char* op = "mlx_native_dequantize";
  TORCH_CHECK_VALUE(bits == 4 || bits == 5 || bits == 6 || bits == 8,
                    "[kvq.mlx_native_dequantize] bits must be 4, 5, 6 or 8, got ", bits);
  TORCH_CHECK_VALUE(codes.dim() == 4 && norms.dim() == 4,
                    "[kvq.mlx_native_dequantize] codes and norms must have 4 dimensions, got ",
                    codes.dim(), " and ", norms.dim());
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kByte && norms.scalar_type() == at::kFloat,
                   "[kvq.mlx_native_dequantize] codes must be uint8 and norms float32, got ",
                   codes.scalar_type(), " and ", norms.scalar_type());
  MlxNative checked;
  const int64_t head_dim = codes.size(3) * (bits == 4 ? 2 : 1);
  checked.side.head_dim = head_dim;
  TORCH_CHECK_VALUE(head_dim > 0 && (head_dim <= 256 || head_dim == 512),
                    "[kvq.mlx_native_dequantize] head_dim must be at most 256, or 512, got ",
                    head_dim);
  const int64_t per_vector = head_dim > 256 ? head_dim / 256 : 1;
  TORCH_CHECK_VALUE(norms.size(0) == codes.size(0) && norms.size(1) == codes.size(1) &&
                        norms.size(2) == codes.size(2) && norms.size(3) == per_vector,
                    "[kvq.mlx_native_dequantize] norms must be [", codes.size(0), ", ",
                    codes.size(1), ", ", codes.size(2), ", ", per_vector, "], got ", norms.sizes());
  TORCH_CHECK_VALUE(norms.device() == codes.device(),
                    "[kvq.mlx_native_dequantize] norms must be on ", codes.device(), ", got ",
                    norms.device());
  TORCH_CHECK_VALUE(
      codes.stride(3) == 1 && (per_vector == 1 || norms.stride(3) == 1),
      "[kvq.mlx_native_dequantize] codes and norms must have contiguous rows, got strides ",
      codes.strides(), " and ", norms.strides());
  TORCH_CHECK_VALUE(scale_factor_d512 > 0,
                    "[kvq.mlx_native_dequantize] scale_factor_d512 must be positive, got ",
                    scale_factor_d512);
  checked.codebook =
      (codebook ? *codebook : default_codebook(bits).to(codes.device())).contiguous();
  TORCH_CHECK_VALUE(checked.codebook.dim() == 1 && checked.codebook.size(0) == (1 << bits) &&
                        checked.codebook.scalar_type() == at::kFloat &&
                        checked.codebook.device() == codes.device(),
                    "[kvq.mlx_native_dequantize] codebook must be float32 [", 1 << bits, "] on ",
                    codes.device(), ", got ", checked.codebook.scalar_type(), " ",
                    checked.codebook.sizes(), " on ", checked.codebook.device());
  check_rotation_and_mean(op, "", checked.side, codes.size(1), signs, std::nullopt, codes.device());
  checked.tokens = check_range(op, start, length, codes.size(2));
  return checked;
}

}  // namespace kvq
