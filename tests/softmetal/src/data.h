// A dispatch_data_t of the software device.
#pragma once

#include <string>

struct softmetal_data {
  std::string bytes;
};
