// quantize, quantize_into_, append_, dequantize and qdq on the CPU.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "parallel.h"
#include "rows.h"

namespace kvq::cpu {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

/// Vectors per task: enough work to outweigh handing it out.
constexpr int64_t kGrain = 128;

/// One per batch row.
using Positions = c10::SmallVector<int64_t, 8>;

kvq::Packed empty_packed(const Format& format, const at::Tensor& x, at::ScalarType scale_dtype) {
  const int64_t d = x.size(3);
  const auto make = [&](int64_t row, at::ScalarType dtype) {
    return at::empty({x.size(0), x.size(1), x.size(2), row}, x.options().dtype(dtype));
  };
  return {make(format.codes_row(d), format.is_none() ? x.scalar_type() : at::kByte),
          make(format.scales_row(d), scale_dtype), make(format.biases_row(d), scale_dtype)};
}

/// Everything about one side of a write, checked, ready to run.
struct Write {
  EncodeArgs args;
  int64_t vectors = 0;
  at::Tensor x;  // keeps a contiguous copy alive
  Side side;
};

Write prepare_write(const char* op, const char* prefix, const kvq::Packed& packed,
                    const at::Tensor& x, Side side, at::IntArrayRef positions, bool ring) {
  Write write;
  write.side = std::move(side);
  write.x = x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous();
  EncodeArgs& args = write.args;
  args.out = packed_rows(op, packed, write.side.format);
  args.x = rows_of(write.x);
  args.x_dtype = float_dtype(op, prefix, x.scalar_type());
  args.heads = x.size(1);
  args.capacity = packed.codes.size(2);
  args.ring = ring;
  // In a ring, tokens that later ones of the same call overwrite are never written.
  args.first = ring ? std::max<int64_t>(0, x.size(2) - args.capacity) : 0;
  args.tokens = x.size(2) - args.first;
  args.position = positions.data();
  args.signs = data_or_null(write.side.signs);
  args.mean = data_or_null(write.side.mean);
  args.encoder = write.side.encoder;
  write.vectors = x.size(0) * x.size(1) * args.tokens;
  return write;
}

void run(const Write& write) {
  parallel_for(write.vectors, kGrain,
               [&](int64_t begin, int64_t end) { kernels().encode(write.args, begin, end); });
}

Side check_side(const char* op, const char* prefix, const at::Tensor& x, const Format& format,
                std::string_view encoder, const OptionalTensor& signs, const OptionalTensor& mean) {
  Side side{format};
  side.encoder = side.format.parse_encoder(op, encoder);
  side.head_dim = x.size(3);
  side.format.check_head_dim(op, side.head_dim);
  check_rotation_and_mean(op, prefix, side, x.size(1), signs, mean, x.device());
  return side;
}

at::ScalarType checked_scale_dtype(const char* op, std::optional<at::ScalarType> wanted,
                                   const at::Tensor& x) {
  const auto dtype = wanted.value_or(default_scale_dtype(x.scalar_type()));
  float_dtype(op, "scale_dtype", dtype);
  return dtype;
}

kvq::Packed quantize_as(const char* op, const at::Tensor& x, std::string_view format,
                        int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                        std::string_view encoder, std::optional<at::ScalarType> scale_dtype) {
  check_input(op, "x", x, at::kCPU);
  Side side = check_side(op, "", x, Format::parse(op, format, group_size), encoder, signs, mean);
  kvq::Packed out = empty_packed(side.format, x, checked_scale_dtype(op, scale_dtype, x));
  const Positions positions(x.size(0), 0);
  run(prepare_write(op, "x", out, x, std::move(side), positions, /*ring=*/false));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize(const at::Tensor& x,
                                                        c10::string_view format, int64_t group_size,
                                                        const OptionalTensor& signs,
                                                        const OptionalTensor& mean,
                                                        c10::string_view encoder,
                                                        std::optional<at::ScalarType> scale_dtype) {
  auto out = quantize_as("quantize", x, format, group_size, signs, mean, encoder, scale_dtype);
  return {std::move(out.codes), std::move(out.scales), std::move(out.biases)};
}

constexpr const char* kNames[] = {"codes", "scales", "biases"};
constexpr const char* kKeyNames[] = {"k_codes", "k_scales", "k_biases"};
constexpr const char* kValueNames[] = {"v_codes", "v_scales", "v_biases"};

struct SideArguments {
  const char* prefix;             ///< "k_", "v_" or ""
  const char* const (&names)[3];  ///< of the tensors that are written
  const char* name;               ///< of the tensor to append
  kvq::Packed packed;
  const at::Tensor& x;
  std::string_view format;
  int64_t group_size;
  const OptionalTensor& signs;
  const OptionalTensor& mean;
  std::string_view encoder;
};

void write_sides(const char* op, std::initializer_list<SideArguments> sides,
                 at::IntArrayRef positions, bool ring) {
  c10::SmallVector<Named, 6> written, read;
  c10::SmallVector<Write, 2> writes;
  for (const SideArguments& s : sides) {
    check_input(op, s.name, s.x, at::kCPU);
    const Format format = Format::parse(op, s.format, s.group_size);
    check_packed(op, s.prefix, s.packed, format);
    check_append(op, s.name, s.x, s.packed, format);
    TORCH_CHECK_VALUE(s.x.size(0) == static_cast<int64_t>(positions.size()), "[kvq.", op,
                      "] key and value must have the same batch, got ", positions.size(), " and ",
                      s.x.size(0));
    TORCH_CHECK_VALUE(s.packed.codes.device() == s.x.device(), "[kvq.", op, "] ", s.prefix,
                      "codes must be on ", s.x.device(), ", got ", s.packed.codes.device());
    check_capacity(op, positions, s.x.size(2), s.packed.codes.size(2), ring);
    Side side = check_side(op, s.prefix, s.x, format, s.encoder, s.signs, s.mean);
    written.push_back({s.names[0], s.packed.codes});
    written.push_back({s.names[1], s.packed.scales});
    written.push_back({s.names[2], s.packed.biases});
    read.push_back({s.name, s.x});
    writes.push_back(prepare_write(op, s.name, s.packed, s.x, std::move(side), positions, ring));
  }
  check_no_overlap(op, written, read);
  for (const Write& write : writes) run(write);
}

void quantize_into_int(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                       const at::Tensor& x, at::IntArrayRef positions, c10::string_view format,
                       int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                       c10::string_view encoder, bool ring) {
  write_sides(
      "quantize_into_",
      {{"", kNames, "x", {codes, scales, biases}, x, format, group_size, signs, mean, encoder}},
      positions, ring);
}

void quantize_into(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                   const at::Tensor& x, const at::Tensor& position, c10::string_view format,
                   int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                   c10::string_view encoder, bool ring) {
  check_input("quantize_into_", "x", x, at::kCPU);
  check_positions("quantize_into_", "position", position, x.size(0), at::kCPU);
  quantize_into_int(codes, scales, biases, x, position_values(position, x.size(0)), format,
                    group_size, signs, mean, encoder, ring);
}

void quantize_into_at(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                      const at::Tensor& x, int64_t position, c10::string_view format,
                      int64_t group_size, const OptionalTensor& signs, const OptionalTensor& mean,
                      c10::string_view encoder, bool ring) {
  check_input("quantize_into_", "x", x, at::kCPU);
  quantize_into_int(codes, scales, biases, x, Positions(x.size(0), position), format, group_size,
                    signs, mean, encoder, ring);
}

void append_values(const at::Tensor& k_codes, const at::Tensor& k_scales,
                   const at::Tensor& k_biases, const at::Tensor& v_codes,
                   const at::Tensor& v_scales, const at::Tensor& v_biases, const at::Tensor& k,
                   const at::Tensor& v, at::IntArrayRef positions, c10::string_view k_format,
                   int64_t k_group_size, c10::string_view v_format, int64_t v_group_size,
                   const OptionalTensor& k_signs, const OptionalTensor& v_signs,
                   const OptionalTensor& k_mean, const OptionalTensor& v_mean,
                   c10::string_view k_encoder, c10::string_view v_encoder, bool ring) {
  check_input("append_", "value", v, at::kCPU);
  TORCH_CHECK_VALUE(k.size(2) == v.size(2),
                    "[kvq.append_] key and value must have as many tokens, ", "got ", k.size(2),
                    " and ", v.size(2));
  write_sides("append_",
              {{"k_",
                kKeyNames,
                "key",
                {k_codes, k_scales, k_biases},
                k,
                k_format,
                k_group_size,
                k_signs,
                k_mean,
                k_encoder},
               {"v_",
                kValueNames,
                "value",
                {v_codes, v_scales, v_biases},
                v,
                v_format,
                v_group_size,
                v_signs,
                v_mean,
                v_encoder}},
              positions, ring);
}

void append(const at::Tensor& k_codes, const at::Tensor& k_scales, const at::Tensor& k_biases,
            const at::Tensor& v_codes, const at::Tensor& v_scales, const at::Tensor& v_biases,
            const at::Tensor& k, const at::Tensor& v, const at::Tensor& position,
            c10::string_view k_format, int64_t k_group_size, c10::string_view v_format,
            int64_t v_group_size, const OptionalTensor& k_signs, const OptionalTensor& v_signs,
            const OptionalTensor& k_mean, const OptionalTensor& v_mean, c10::string_view k_encoder,
            c10::string_view v_encoder, bool ring) {
  check_input("append_", "key", k, at::kCPU);
  check_positions("append_", "position", position, k.size(0), at::kCPU);
  append_values(k_codes, k_scales, k_biases, v_codes, v_scales, v_biases, k, v,
                position_values(position, k.size(0)), k_format, k_group_size, v_format,
                v_group_size, k_signs, v_signs, k_mean, v_mean, k_encoder, v_encoder, ring);
}

void append_at(const at::Tensor& k_codes, const at::Tensor& k_scales, const at::Tensor& k_biases,
               const at::Tensor& v_codes, const at::Tensor& v_scales, const at::Tensor& v_biases,
               const at::Tensor& k, const at::Tensor& v, int64_t position,
               c10::string_view k_format, int64_t k_group_size, c10::string_view v_format,
               int64_t v_group_size, const OptionalTensor& k_signs, const OptionalTensor& v_signs,
               const OptionalTensor& k_mean, const OptionalTensor& v_mean,
               c10::string_view k_encoder, c10::string_view v_encoder, bool ring) {
  check_input("append_", "key", k, at::kCPU);
  append_values(k_codes, k_scales, k_biases, v_codes, v_scales, v_biases, k, v,
                Positions(k.size(0), position), k_format, k_group_size, v_format, v_group_size,
                k_signs, v_signs, k_mean, v_mean, k_encoder, v_encoder, ring);
}

at::Tensor dequantize_as(const char* op, const kvq::Packed& packed, const Side& side,
                         at::ScalarType dtype, int64_t start, int64_t tokens) {
  const at::Tensor& codes = packed.codes;
  at::Tensor out = at::empty({codes.size(0), codes.size(1), tokens, side.head_dim},
                             codes.options().dtype(dtype));
  DecodeArgs args;
  args.in = packed_rows(op, packed, side.format);
  args.out = rows_of(out);
  args.out_dtype = float_dtype(op, "dtype", dtype);
  args.heads = codes.size(1);
  args.start = start;
  args.tokens = tokens;
  args.signs = data_or_null(side.signs);
  args.mean = data_or_null(side.mean);
  parallel_for(codes.size(0) * codes.size(1) * tokens, kGrain,
               [&](int64_t begin, int64_t end) { kernels().decode(args, begin, end); });
  return out;
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& biases,
                      c10::string_view format, int64_t group_size, const OptionalTensor& signs,
                      const OptionalTensor& mean, std::optional<at::ScalarType> dtype,
                      int64_t start, std::optional<int64_t> length) {
  const char* op = "dequantize";
  const kvq::Packed packed{codes, scales, biases};
  Side side{Format::parse(op, format, group_size)};
  check_packed(op, "", packed, side.format);
  side.head_dim = side.format.head_dim(codes.size(3));
  check_rotation_and_mean(op, "", side, codes.size(1), signs, mean, codes.device());
  const int64_t tokens = check_range(op, start, length, codes.size(2));
  const auto out_dtype = dtype.value_or(at::kFloat);
  float_dtype(op, "dtype", out_dtype);
  return dequantize_as(op, packed, side, out_dtype, start, tokens);
}

at::Tensor qdq(const at::Tensor& x, c10::string_view format, int64_t group_size,
               const OptionalTensor& signs, const OptionalTensor& mean, c10::string_view encoder,
               std::optional<at::ScalarType> scale_dtype) {
  const char* op = "qdq";
  const auto packed = quantize_as(op, x, format, group_size, signs, mean, encoder, scale_dtype);
  const Side side =
      check_side(op, "", x, Format::parse(op, format, group_size), encoder, signs, mean);
  return dequantize_as(op, packed, side, x.scalar_type(), 0, x.size(2));
}

TORCH_LIBRARY_IMPL(kvq, CPU, m) {
  m.impl("quantize", TORCH_FN(quantize));
  m.impl("quantize_into_", TORCH_FN(quantize_into));
  m.impl("quantize_into_.int", TORCH_FN(quantize_into_at));
  m.impl("append_", TORCH_FN(append));
  m.impl("append_.int", TORCH_FN(append_at));
  m.impl("dequantize", TORCH_FN(dequantize));
  m.impl("qdq", TORCH_FN(qdq));
}

}  // namespace
}  // namespace kvq::cpu
