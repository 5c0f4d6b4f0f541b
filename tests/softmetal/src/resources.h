// Buffers, functions and pipelines of the software device.
#pragma once

#import <Metal/Metal.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernel_library.h"

namespace softmetal {

/// Function constants by index, as the emulator wants them.
using ConstantTable = std::map<uint32_t, std::string>;

/// A function with its constants: what a pipeline is made of and runs.
struct Specialization {
  std::shared_ptr<KernelLibrary> library;
  const emu_kernel* kernel;
  ConstantTable constants;

  std::vector<emu_constant_value> constant_values() const;
};

}  // namespace softmetal

/// Memory between guard pages: it ends (rounded up to 16 bytes) where the upper one begins. What is
/// left of its pages holds a canary.
@interface SoftBuffer : NSObject <MTLBuffer> {
 @public
  char* mapping;
  size_t mapping_bytes;
  char* bytes;
  NSUInteger length;
}
+ (SoftBuffer*)newWithLength:(NSUInteger)length;
/// Aborts where `object` is not the address of a living buffer.
+ (SoftBuffer*)checked:(id)object atIndex:(NSUInteger)index;
/// False where somebody wrote beside the buffer.
- (BOOL)isIntact;
@end

@interface SoftFunction : NSObject <MTLFunction> {
 @public
  softmetal::Specialization* specialization;
}
@end

@interface SoftPipeline : NSObject <MTLComputePipelineState> {
 @public
  softmetal::Specialization* specialization;
}
@end

@interface SoftDevice : NSObject <MTLDevice>
+ (SoftDevice*)shared;
@end
