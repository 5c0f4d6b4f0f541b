#include "kernel_library.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>
#include <vector>

#include "config.h"

extern char** environ;

namespace softmetal {
namespace {

uint64_t fnv1a(const std::string& text, uint64_t hash) {
  for (unsigned char byte : text) hash = (hash ^ byte) * 0x100000001b3ull;
  return hash;
}

std::string content_key(const std::string& text) {
  char key[33];
  std::snprintf(key, sizeof(key), "%016llx%016llx",
                static_cast<unsigned long long>(fnv1a(text, 0xcbf29ce484222325ull)),
                static_cast<unsigned long long>(fnv1a(text, 0x9ae16a3b2f90404full)));
  return key;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

bool exists(const std::string& path) { return access(path.c_str(), R_OK) == 0; }

/// Holds a file lock while in scope, so that two test processes do not compile the same source.
class FileLock {
 public:
  explicit FileLock(const std::string& path)
      : file_(open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0644)) {
    if (file_ >= 0) flock(file_, LOCK_EX);
  }
  ~FileLock() {
    if (file_ >= 0) close(file_);
  }

 private:
  int file_;
};

/// Runs a program with its output going to a file; returns its exit status.
int run(const std::vector<std::string>& arguments, const std::string& output) {
  std::vector<char*> argv;
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  std::vector<char*> environment;  // a preloaded sanitizer is for this process, not for compilers
  for (char** entry = environ; *entry; ++entry) {
    if (std::strncmp(*entry, "LD_PRELOAD=", 11) != 0) environment.push_back(*entry);
  }
  environment.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, output.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0644);
  posix_spawn_file_actions_adddup2(&actions, 1, 2);
  pid_t child = 0;
  const int failed =
      posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environment.data());
  posix_spawn_file_actions_destroy(&actions);
  if (failed) return failed;
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return status;
}

bool mentions_bfloat(const std::string& source) {
  static const std::regex comment(R"(//[^\n]*|/\*[^*]*\*+(?:[^/*][^*]*\*+)*/)");
  static const std::regex bfloat(R"(\bbfloat[234]?\b)");
  return std::regex_search(std::regex_replace(source, comment, " "), bfloat);
}

void replace_all(std::string& text, const std::string& from, const std::string& to) {
  for (size_t at; (at = text.find(from)) != std::string::npos;) text.replace(at, from.size(), to);
}

/// Compiles unless the cache has it. Returns the library's path, or an empty string and an error.
std::string build(const CompileRequest& request, std::string& error) {
  const Config& settings = config();
  if (!request.has_bfloat && mentions_bfloat(request.source)) {
    error = "program_source: error: unknown type name 'bfloat' (needs Metal language 3.1)";
    return "";
  }
  const std::string mode =
      settings.mode == "fast" && request.fast_math ? "fastmath" : settings.mode;
  const std::string stem =
      settings.cache + "/" +
      content_key(settings.toolchain_key + '\0' + mode + '\0' + request.source);
  const std::string library = stem + ".so", source = stem + ".metal", log = stem + ".log";
  FileLock lock(stem + ".lock");
  if (exists(library)) return library;

  std::ofstream(source, std::ios::binary) << request.source;
  const std::string unfinished = stem + ".part.so";
  const int status = run({settings.python, settings.toolchain, "compile", "--mode", mode,
                          "--source", source, "--out", unfinished},
                         log);
  if (status != 0 || !exists(unfinished)) {
    error = read_file(log);
    // Metal calls a source string so, and the name of its file says nothing to a reader.
    replace_all(error, source, "program_source");
    replace_all(error, source.substr(source.rfind('/') + 1), "program_source");
    if (error.empty()) error = "the tool chain failed with status " + std::to_string(status);
    return "";
  }
  if (std::rename(unfinished.c_str(), library.c_str()) != 0) {
    error = "cannot write " + library;
    return "";
  }
  return library;
}

}  // namespace

std::shared_ptr<KernelLibrary> KernelLibrary::compile(const CompileRequest& request,
                                                      std::string& error) {
  const std::string path = build(request, error);
  if (path.empty()) return nullptr;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    error = dlerror();
    return nullptr;
  }
  auto get_api = reinterpret_cast<emu_get_api_fn>(dlsym(handle, EMU_API_SYMBOL));
  if (!get_api || get_api()->abi_version != EMU_ABI_VERSION) {
    error = path + " has another ABI of the emulator than this build";
    return nullptr;
  }
  return std::shared_ptr<KernelLibrary>(new KernelLibrary(get_api()));
}

const emu_kernel* KernelLibrary::find(const std::string& name) const {
  for (uint32_t i = 0; i < api_->n_kernels; ++i) {
    if (name == api_->kernels[i].name) return &api_->kernels[i];
  }
  return nullptr;
}

const emu_function_constant* KernelLibrary::find_constant(const std::string& name) const {
  for (uint32_t i = 0; i < api_->n_function_constants; ++i) {
    if (name == api_->function_constants[i].name) return &api_->function_constants[i];
  }
  return nullptr;
}

const emu_function_constant* KernelLibrary::find_constant(uint32_t index) const {
  for (uint32_t i = 0; i < api_->n_function_constants; ++i) {
    if (index == api_->function_constants[i].index) return &api_->function_constants[i];
  }
  return nullptr;
}

}  // namespace softmetal
