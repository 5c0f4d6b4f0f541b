#include "write.h"

#include <ATen/ops/empty.h>

namespace kvq::mps {

Side check_side(const char* op, const char* prefix, const at::Tensor& x, std::string_view format,
                int64_t group_size, std::string_view encoder, const OptionalTensor& signs,
                const OptionalTensor& mean) {
  Side side{Format::parse(op, format, group_size)};
  side.encoder = side.format.parse_encoder(op, encoder);
  side.head_dim = x.size(3);
  side.format.check_head_dim(op, side.head_dim);
  check_rotation_and_mean(op, prefix, side, x.size(1), signs, mean, x.device());
  return side;
}

Write make_write(const char* op, const Packed& packed, const at::Tensor& x, Side side) {
  const bool rows_contiguous = x.size(3) <= 1 || x.stride(3) == 1;
  at::Tensor rows = rows_contiguous ? x : x.contiguous();
  const bool wide = is_wide(side, rows, packed.codes);
  return {std::move(side), packed, std::move(rows), float_dtype(op, "x", x.scalar_type()), wide};
}

std::vector<Write> check_writes(const char* op, const std::vector<SideArguments>& sides,
                                const Position& position, bool ring) {
  std::vector<Named> written, read;
  std::vector<Side> checked;
  for (const SideArguments& s : sides) {
    check_input(op, s.name, s.x, kDevice);
    const Format format = Format::parse(op, s.format, s.group_size);
    check_packed(op, s.prefix, s.packed, format);
    check_append(op, s.name, s.x, s.packed, format);
    TORCH_CHECK_VALUE(s.packed.codes.device() == s.x.device(), "[kvq.", op, "] ", s.prefix,
                      "codes must be on ", s.x.device(), ", got ", s.packed.codes.device());
    check_capacity(op, position.known(), s.x.size(2), s.packed.codes.size(2), ring);
    checked.push_back(
        check_side(op, s.prefix, s.x, s.format, s.group_size, s.encoder, s.signs, s.mean));
    written.push_back({s.names[0], s.packed.codes});
    written.push_back({s.names[1], s.packed.scales});
    written.push_back({s.names[2], s.packed.biases});
    read.push_back({s.name, s.x});
  }
  check_no_overlap(op, written, read);
  std::vector<Write> writes;
  for (size_t i = 0; i < sides.size(); ++i) {
    writes.push_back(make_write(op, sides[i].packed, sides[i].x, std::move(checked[i])));
  }
  return writes;
}

KvqWriteParams write_params(std::initializer_list<const Write*> writes, const Position& position,
                            bool ring) {
  KvqWriteParams params{};
  params.steps = std::numeric_limits<int32_t>::max();
  size_t i = 0;
  for (const Write* write : writes) {
    const auto& [codes, scales, biases] = write->packed;
    KvqWriteSide& side = params.side[i++];
    side.x = strides_of(write->x);
    side.codes = strides_of(codes);
    side.codes_step = codes.size(3) > 1 ? codes.stride(3) : 1;
    if (scales.defined()) {
      side.scales = strides_of(scales);
      side.biases = strides_of(biases);
      side.scale_dtype = float_dtype("write", "scales", scales.scalar_type());
    }
    if (write->side.format.is_none()) {
      side.codes_dtype = float_dtype("write", "codes", codes.scalar_type());
    }
    side.capacity = codes.size(2);
    side.heads = static_cast<int32_t>(write->x.size(1));
    side.head_dim = static_cast<int32_t>(write->side.head_dim);
    side.block = hadamard_block(write->side.head_dim);
    side.norm = hadamard_norm(write->side.head_dim);
    side.encoder = write->side.encoder;
    params.batch = static_cast<int32_t>(write->x.size(0));
    params.tokens = static_cast<int32_t>(write->x.size(2));
    params.heads = std::max(params.heads, side.heads);
    const int64_t floats = row_floats(write->side, write->wide);
    params.steps = std::min(
        params.steps, steps_for(write->side, params.tokens, write->x.size(0) * write->x.size(1),
                                write->wide, kWriteSteps));
    params.row = std::max(params.row, static_cast<int32_t>(floats));
  }
  params.ring = ring;
  if (position.tensor.defined()) {
    params.position_bytes = static_cast<int32_t>(position.tensor.element_size());
    params.position_stride = position.tensor.dim() == 0 ? 0 : position.tensor.stride(0);
  } else {
    params.position = position.value;
  }
  return params;
}

runtime::Launch write_launch(const Write& write, const Position& position, bool ring) {
  const KvqWriteParams params = write_params({&write}, position, ring);
  const KernelName name = quantize_kernel(write.dtype, write.side.format);
  runtime::Launch launch{
      .library = name.library,
      .kernel = name.kernel,
      .constants = {{"kvq_rotate", write.side.signs.has_value()},
                    {"kvq_centre", write.side.mean.has_value()},
                    {"kvq_head_dim", static_cast<int32_t>(write.side.head_dim)},
                    {"kvq_wide", write.wide},
                    {"kvq_scale_dtype", params.side[0].scale_dtype}},
      .buffers = {write.x, write.packed.codes, write.packed.scales, write.packed.biases,
                  position.tensor, or_none(write.side.signs), or_none(write.side.mean)},
      .params = params,
  };
  lay_out(launch, simdgroups_for(params.tokens, vectors_of(write.side, write.wide), params.steps),
          params.heads, params.batch, params.row);
  return launch;
}

Write empty_write(const char* op, const at::Tensor& x, std::string_view format, int64_t group_size,
                  const OptionalTensor& signs, const OptionalTensor& mean, std::string_view encoder,
                  std::optional<at::ScalarType> scale_dtype) {
  check_input(op, "x", x, kDevice);
  Side side = check_side(op, "", x, format, group_size, encoder, signs, mean);
  const auto scales_dtype = scale_dtype.value_or(default_scale_dtype(x.scalar_type()));
  float_dtype(op, "scale_dtype", scales_dtype);
  const auto make = [&](int64_t row, at::ScalarType dtype) {
    return at::empty({x.size(0), x.size(1), x.size(2), row}, x.options().dtype(dtype));
  };
  const Format& f = side.format;
  const int64_t d = side.head_dim;
  const Packed packed{make(f.codes_row(d), f.is_none() ? x.scalar_type() : at::kByte),
                      make(f.scales_row(d), scales_dtype), make(f.biases_row(d), scales_dtype)};
  return make_write(op, packed, x, std::move(side));
}

}  // namespace kvq::mps
