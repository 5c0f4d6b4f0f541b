// Command queues, command buffers and encoders of the software device.
#pragma once

#import <Metal/Metal.h>

namespace softmetal {

id<MTLCommandQueue> new_command_queue();

}  // namespace softmetal
