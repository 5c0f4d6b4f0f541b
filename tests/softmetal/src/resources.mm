// Everything of the software device that is not a command: buffers, libraries, pipelines, itself.
#include "resources.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_set>

#include "commands.h"
#include "config.h"
#include "data.h"
#include "foundation.h"
#include "softmetal.h"

using softmetal::config;
using softmetal::counters;
using softmetal::fatal;
using softmetal::make_error;
using softmetal::make_string;

namespace {

constexpr NSUInteger kMaxBufferLength = NSUInteger(64) << 30;
constexpr char kCanary = '\xA5';
constexpr char kPoison = '\xCD';
/// Address space on either side of a buffer that no access may touch: far strides end there, too.
constexpr size_t kGuardBytes = size_t(64) << 20;
/// Larger buffers stay zero and take no memory until they are touched.
constexpr NSUInteger kMaxPoisonedBytes = NSUInteger(16) << 20;

size_t page_size() {
  static const size_t size = sysconf(_SC_PAGESIZE);
  return size;
}

size_t round_up(size_t value, size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// The living buffers: a wrong pointer is told from a buffer by looking here.
struct Registry {
  std::mutex mutex;
  std::unordered_set<const void*> living;
};

Registry& registry() {
  static auto* registry = new Registry;
  return *registry;
}

void set_error(NSError** error, const std::string& message) {
  if (error) *error = make_error(message);
}

void forbid_in_block(const char* what) {
  if (softmetal::on_queue(nullptr)) {
    fatal("%s inside a dispatched block: it can fail and allocate, so it belongs before it", what);
  }
}

struct ConstantValue {
  MTLDataType type;
  std::string bytes;
};

/// What MTLFunctionConstantValues holds.
struct ConstantValues {
  std::map<NSUInteger, ConstantValue> by_index;
  std::map<std::string, ConstantValue> by_name;
};

struct TypeInfo {
  const char* msl;
  size_t size;
};

TypeInfo type_info(MTLDataType type) {
  switch (type) {
    case MTLDataTypeFloat:
      return {"float", 4};
    case MTLDataTypeHalf:
      return {"half", 2};
    case MTLDataTypeInt:
      return {"int", 4};
    case MTLDataTypeUInt:
      return {"uint", 4};
    case MTLDataTypeShort:
      return {"short", 2};
    case MTLDataTypeUShort:
      return {"ushort", 2};
    case MTLDataTypeChar:
      return {"char", 1};
    case MTLDataTypeUChar:
      return {"uchar", 1};
    case MTLDataTypeBool:
      return {"bool", 1};
    default:
      fatal("setConstantValue: data type %lu is not one a function constant can have", type);
  }
}

ConstantValue constant_value(const void* value, MTLDataType type) {
  if (!value) fatal("setConstantValue: the value is NULL");
  return {type, std::string(static_cast<const char*>(value), type_info(type).size)};
}

std::string without_spaces(std::string text) {
  std::erase(text, ' ');
  return text;
}

/// Resolves names to indices; returns an error message, or an empty string.
std::string resolve(const softmetal::KernelLibrary& library, const ConstantValues& values,
                    softmetal::ConstantTable& table) {
  auto add = [&](const emu_function_constant* declared, const std::string& name,
                 const ConstantValue& value) -> std::string {
    // Metal ignores such a value; nobody means to set one, though.
    if (!declared) return "no function constant " + name + " in this library";
    const std::string given = type_info(value.type).msl;
    const std::string wanted = without_spaces(declared->type);
    if (given != wanted) {
      return "function constant " + name + " is a " + wanted + ", got a " + given;
    }
    table[declared->index] = value.bytes;
    return "";
  };
  for (const auto& [index, value] : values.by_index) {
    std::string error = add(library.find_constant(index), std::to_string(index), value);
    if (!error.empty()) return error;
  }
  for (const auto& [name, value] : values.by_name) {
    std::string error = add(library.find_constant(name), name, value);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace

namespace softmetal {

std::vector<emu_constant_value> Specialization::constant_values() const {
  std::vector<emu_constant_value> values;
  for (const auto& [index, bytes] : constants) {
    values.push_back({index, static_cast<uint32_t>(bytes.size()), bytes.data()});
  }
  return values;
}

}  // namespace softmetal

@implementation SoftBuffer
+ (SoftBuffer*)newWithLength:(NSUInteger)length {
  const size_t body = round_up(length, page_size());
  SoftBuffer* buffer = [SoftBuffer new];
  buffer->length = length;
  buffer->mapping_bytes = body + 2 * kGuardBytes;
  void* mapping = mmap(nullptr, buffer->mapping_bytes, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) fatal("no address space for a buffer of %lu bytes", length);
  buffer->mapping = static_cast<char*>(mapping);
  char* begin = buffer->mapping + kGuardBytes;
  mprotect(begin, body, PROT_READ | PROT_WRITE);
  buffer->bytes = begin + body - round_up(length, 16);
  std::memset(begin, kCanary, buffer->bytes - begin);
  std::memset(buffer->bytes + length, kCanary, round_up(length, 16) - length);
  if (length <= kMaxPoisonedBytes) std::memset(buffer->bytes, kPoison, length);

  const uint64_t total = counters().buffer_bytes += length;
  uint64_t peak = counters().peak_buffer_bytes;
  while (peak < total && !counters().peak_buffer_bytes.compare_exchange_weak(peak, total)) {
  }
  std::lock_guard<std::mutex> lock(registry().mutex);
  registry().living.insert(buffer);
  return buffer;
}
+ (SoftBuffer*)checked:(id)object atIndex:(NSUInteger)index {
  std::lock_guard<std::mutex> lock(registry().mutex);
  if (!registry().living.count(object)) {
    fatal("setBuffer: %p at index %lu is not a living MTLBuffer (data_ptr() of a tensor? freed?)",
          (void*)object, index);
  }
  return (SoftBuffer*)object;
}
- (BOOL)isIntact {
  const auto is_canary = [](char byte) { return byte == kCanary; };
  return std::all_of(mapping + kGuardBytes, bytes, is_canary) &&
         std::all_of(bytes + length, bytes + round_up(length, 16), is_canary);
}
- (NSUInteger)length {
  return length;
}
- (id<MTLDevice>)device {
  return [SoftDevice shared];
}
- (void*)contents {
  return bytes;
}
- (void)dealloc {
  {
    std::lock_guard<std::mutex> lock(registry().mutex);
    registry().living.erase(self);
  }
  if (![self isIntact]) fatal("somebody wrote beside an MTLBuffer of %lu bytes", length);
  counters().buffer_bytes -= length;
  munmap(mapping, mapping_bytes);
  [super dealloc];
}
@end

@implementation MTLCompileOptions
- (instancetype)init {
  _languageVersion = MTLLanguageVersion3_2;
  _mathMode = MTLMathModeFast;  // Metal's default
  return self;
}
- (MTLLanguageVersion)languageVersion {
  return _languageVersion;
}
- (void)setLanguageVersion:(MTLLanguageVersion)version {
  _languageVersion = version;
}
- (MTLMathMode)mathMode {
  return _mathMode;
}
- (void)setMathMode:(MTLMathMode)mode {
  _mathMode = mode;
}
- (BOOL)fastMathEnabled {
  return _mathMode == MTLMathModeFast;
}
- (void)setFastMathEnabled:(BOOL)enabled {
  _mathMode = enabled ? MTLMathModeFast : MTLMathModeSafe;
}
@end

@implementation MTLFunctionConstantValues
- (instancetype)init {
  _values = new ConstantValues;
  return self;
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type atIndex:(NSUInteger)index {
  static_cast<ConstantValues*>(_values)->by_index[index] = constant_value(value, type);
}
- (void)setConstantValue:(const void*)value type:(MTLDataType)type withName:(NSString*)name {
  static_cast<ConstantValues*>(_values)->by_name[[name UTF8String]] = constant_value(value, type);
}
- (void)dealloc {
  delete static_cast<ConstantValues*>(_values);
  [super dealloc];
}
@end

@implementation SoftFunction
- (NSString*)name {
  return make_string(specialization->kernel->name);
}
- (void)dealloc {
  delete specialization;
  [super dealloc];
}
@end

@implementation SoftPipeline
- (NSUInteger)maxTotalThreadsPerThreadgroup {
  return std::min(specialization->kernel->max_threads, config().max_threads);
}
- (NSUInteger)threadExecutionWidth {
  return 32;
}
- (NSUInteger)staticThreadgroupMemoryLength {
  return specialization->library->api().static_threadgroup_bytes(specialization->kernel);
}
- (void)dealloc {
  delete specialization;
  [super dealloc];
}
@end

@interface SoftLibrary : NSObject <MTLLibrary> {
 @public
  std::shared_ptr<softmetal::KernelLibrary>* library;
}
@end

@implementation SoftLibrary
- (NSArray*)functionNames {
  const emu_api& api = (*library)->api();
  std::vector<std::string> names;
  for (uint32_t i = 0; i < api.n_kernels; ++i) names.push_back(api.kernels[i].name);
  return softmetal::make_array(names);
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)functionName {
  return [self newFunctionWithName:functionName constantValues:nil error:nullptr];
}
- (id<MTLFunction>)newFunctionWithName:(NSString*)name
                        constantValues:(MTLFunctionConstantValues*)constantValues
                                 error:(NSError**)error {
  const emu_kernel* kernel = (*library)->find([name UTF8String]);
  if (!kernel) {
    set_error(error, std::string("no function named ") + [name UTF8String] + " in this library");
    return nil;
  }
  softmetal::ConstantTable table;
  if (constantValues) {
    const auto& values = *static_cast<ConstantValues*>(constantValues->_values);
    const std::string message = resolve(**library, values, table);
    if (!message.empty()) {
      set_error(error, message);
      return nil;
    }
  }
  SoftFunction* function = [SoftFunction new];
  function->specialization = new softmetal::Specialization{*library, kernel, std::move(table)};
  return function;
}
- (void)dealloc {
  delete library;
  [super dealloc];
}
@end

@implementation SoftDevice
+ (SoftDevice*)shared {
  static SoftDevice* device = [SoftDevice new];
  return device;
}
- (NSString*)name {
  return @"Software Metal";
}
- (NSUInteger)maxThreadgroupMemoryLength {
  return EMU_MAX_THREADGROUP_BYTES;
}
- (NSUInteger)maxBufferLength {
  return kMaxBufferLength;
}
- (id<MTLCommandQueue>)newCommandQueue {
  return softmetal::new_command_queue();
}
- (id<MTLBuffer>)newBufferWithLength:(NSUInteger)length options:(MTLResourceOptions)options {
  forbid_in_block("newBufferWithLength");
  if (length == 0) fatal("newBufferWithLength: 0");
  if (length > kMaxBufferLength) return nil;
  return [SoftBuffer newWithLength:length];
}
- (id<MTLLibrary>)newLibraryWithSource:(NSString*)source
                               options:(MTLCompileOptions*)options
                                 error:(NSError**)error {
  forbid_in_block("newLibraryWithSource");
  if (!source) fatal("newLibraryWithSource: nil");
  softmetal::CompileRequest request{[source UTF8String]};
  if (options) {
    request.fast_math = options.mathMode != MTLMathModeSafe;
    request.has_bfloat = options.languageVersion >= MTLLanguageVersion3_1;
  }
  std::string message;
  auto compiled = softmetal::KernelLibrary::compile(request, message);
  if (!compiled) {
    set_error(error, message);
    return nil;
  }
  ++counters().libraries;
  SoftLibrary* library = [SoftLibrary new];
  library->library = new std::shared_ptr<softmetal::KernelLibrary>(std::move(compiled));
  return library;
}
- (id<MTLLibrary>)newLibraryWithData:(dispatch_data_t)data error:(NSError**)error {
  // The "compiled" form of a library is its source here: only Apple's tools write the real one.
  return [self newLibraryWithSource:make_string(data->bytes) options:nil error:error];
}
- (id<MTLComputePipelineState>)newComputePipelineStateWithFunction:(id<MTLFunction>)computeFunction
                                                             error:(NSError**)error {
  forbid_in_block("newComputePipelineStateWithFunction");
  if (!computeFunction) fatal("newComputePipelineStateWithFunction: nil");
  const auto& specialization = *((SoftFunction*)computeFunction)->specialization;
  const std::vector<emu_constant_value> values = specialization.constant_values();
  char message[1024] = "";
  if (specialization.library->api().check_constants(specialization.kernel, values.data(),
                                                    values.size(), message,
                                                    sizeof(message)) != EMU_OK) {
    set_error(error, message);
    return nil;
  }
  ++counters().pipelines;
  SoftPipeline* pipeline = [SoftPipeline new];
  pipeline->specialization = new softmetal::Specialization(specialization);
  return pipeline;
}
@end

extern "C" SOFTMETAL_API id<MTLDevice> MTLCreateSystemDefaultDevice(void) {
  return [[SoftDevice shared] retain];
}
