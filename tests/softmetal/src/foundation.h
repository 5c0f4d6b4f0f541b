// Makers of Foundation objects; all results are autoreleased.
#pragma once

#import <Foundation/Foundation.h>

#include <string>
#include <vector>

namespace softmetal {

NSString* make_string(const std::string& text);
NSError* make_error(const std::string& message);
NSArray* make_array(const std::vector<std::string>& strings);

}  // namespace softmetal
