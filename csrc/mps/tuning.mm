#include "tuning.h"

#include <c10/util/Exception.h>

#include <charconv>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <sstream>

#include "runtime.h"

namespace kvq::mps {
namespace {

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// The file's table, unless it was measured on another device.
std::string saved_text() {
  std::ifstream file(tuning_file());
  std::string first;
  if (!std::getline(file, first) || first != "# " + runtime::device_name()) return "";
  std::stringstream rest;
  rest << file.rdbuf();
  return rest.str();
}

TuningTable initial_table() {
  TuningTable table = kBuiltInTuning;
  if (const auto error = parse_tuning(saved_text(), table)) {
    TORCH_WARN("[kvq.tuning] ", tuning_file(), " is ignored: ", *error);
    table = kBuiltInTuning;
  }
  const auto error = parse_tuning(environment("KVQ_TUNING"), table);
  TORCH_CHECK_VALUE(!error, "[kvq.tuning] KVQ_TUNING: ", *error);
  return table;
}

struct State {
  std::mutex mutex;
  std::optional<TuningTable> table;
};

State& state() {
  static State state;
  return state;
}

/// Takes a number and what must follow it from the front of `text`.
bool take(std::string_view& text, int64_t& number, std::string_view separator) {
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  text.remove_prefix(rest - text.data());
  if (error != std::errc() || !text.starts_with(separator)) return false;
  text.remove_prefix(separator.size());
  return true;
}

}  // namespace

std::optional<std::string> parse_tuning(std::string_view text, TuningTable& table) {
  std::istringstream lines{std::string(text)};
  TuningTable found = table;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line.substr(0, line.find('#')));
    for (std::string word; words >> word;) {
      AttentionTuning entry{};
      std::string_view rest = word;
      const bool well_formed = take(rest, entry.rows, ":") && take(rest, entry.tile, ",") &&
                               take(rest, entry.threadgroups, ",") &&
                               take(rest, entry.split_tokens, ",") &&
                               take(rest, entry.matrix, "") && rest.empty();
      const bool known_tile = entry.tile >= 0 && entry.tile <= 8 &&
                              (entry.tile & (entry.tile - 1)) == 0 &&
                              (entry.matrix == 0 || entry.matrix == 8 || entry.matrix == 16);
      AttentionTuning* place = nullptr;
      for (AttentionTuning& each : found) {
        if (each.rows == entry.rows) place = &each;
      }
      if (!well_formed || !known_tile || !place || entry.threadgroups < 1 ||
          entry.split_tokens < 1) {
        return "expected ROWS:TILE,THREADGROUPS,SPLIT_TOKENS,MATRIX with ROWS one of 1, 2, 4, 8, "
               "16, 32 and " +
               std::to_string(kTuningAllRows) +
               ", TILE one of 0, 1, 2, 4 and 8, and MATRIX one of 0, 8 and 16, got " + word;
      }
      *place = entry;
    }
  }
  table = found;
  return std::nullopt;
}

std::string format_tuning(const TuningTable& table) {
  std::string text;
  for (const AttentionTuning& entry : table) {
    text += std::to_string(entry.rows) + ":" + std::to_string(entry.tile) + "," +
            std::to_string(entry.threadgroups) + "," + std::to_string(entry.split_tokens) + "," +
            std::to_string(entry.matrix) + "\n";
  }
  return text;
}

TuningTable tuning() {
  const std::lock_guard lock(state().mutex);
  if (!state().table) state().table = initial_table();
  return *state().table;
}

void set_tuning(const std::string& text) {
  TuningTable table = initial_table();
  const auto error = parse_tuning(text, table);
  TORCH_CHECK_VALUE(!error, "[kvq.tuning] ", *error);
  const std::lock_guard lock(state().mutex);
  state().table = table;
}

std::string tuning_file() {
  const std::string given = environment("KVQ_TUNING_FILE");
  if (!given.empty()) return given;
  const std::string cache = environment("XDG_CACHE_HOME");
  return (cache.empty() ? environment("HOME") + "/.cache" : cache) + "/torch_kvq/tuning.txt";
}

}  // namespace kvq::mps
