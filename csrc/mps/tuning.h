// Choices of attention's launches that change speed, and of results only the order of sums: one
// small table, keyed by the (query, head) rows per KV head. In order of precedence it comes from
// torch.ops.kvq_metal.set_tuning, the environment variable KVQ_TUNING, the file that `python -m
// torch_kvq bench --tune` writes for this device, and the table in this header.
//
// As text a table is entries ROWS:TILE,THREADGROUPS,SPLIT_TOKENS,MATRIX between spaces or newlines,
// of which each replaces the built-in entry of the same ROWS; # begins a comment.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvq::mps {

struct AttentionTuning {
  int64_t rows;          ///< the entry serves up to this many rows per KV head
  int64_t tile;          ///< rows of a decode threadgroup: 1, 2, 4 or 8; 0: the prefill kernel
  int64_t threadgroups;  ///< threadgroups to aim for when splitting the tokens
  int64_t split_tokens;  ///< least tokens of a split
  int64_t matrix;        ///< rows of a matrix threadgroup, 8 or 16, where that kernel serves the
                         ///< call; 0: it is not used, and `tile` says what is
};

/// ROWS of the last entry, which serves all that are left.
constexpr int64_t kTuningAllRows = 1 << 30;

using TuningTable = std::array<AttentionTuning, 7>;

constexpr TuningTable kBuiltInTuning = {{
    {1, 1, 256, 256, 0},
    {2, 2, 256, 256, 0},
    {4, 4, 256, 256, 8},
    {8, 8, 256, 256, 8},
    {16, 8, 256, 256, 16},
    {128, 0, 256, 256, 16},
    {kTuningAllRows, 0, 256, 256, 0},
}};

/// The entry for this many rows per KV head.
inline const AttentionTuning& find_tuning(const TuningTable& table, int64_t rows) {
  for (const AttentionTuning& entry : table) {
    if (rows <= entry.rows) return entry;
  }
  return table.back();
}

/// `table` with the text's entries put in; an error message where the text is not one.
std::optional<std::string> parse_tuning(std::string_view text, TuningTable& table);
std::string format_tuning(const TuningTable& table);

/// The table in force. The file and the environment are read at the first call.
TuningTable tuning();
/// Puts this text's entries into the table that the file and the environment give; "": that table.
void set_tuning(const std::string& text);
/// The file that `bench --tune` writes: KVQ_TUNING_FILE, or below XDG_CACHE_HOME or ~/.cache.
std::string tuning_file();

}  // namespace kvq::mps
