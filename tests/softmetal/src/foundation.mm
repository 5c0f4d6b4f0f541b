// The few Foundation classes that host code of the MPS backend meets, on the gcc runtime.
#import <Foundation/Foundation.h>
#include <objc/message.h>
#include <objc/runtime.h>

#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "foundation.h"
#include "softmetal.h"

using softmetal::counters;
using softmetal::fatal;

// clang emits this personality for every Objective-C++ frame under -fobjc-runtime=gcc; the one of
// libobjc cannot match C++ catch clauses. Ours comes first in link order and forwards to C++'s.
__asm__(".text\n"
        ".globl __gnu_objc_personality_v0\n"
        ".type __gnu_objc_personality_v0, %function\n"
        "__gnu_objc_personality_v0:\n"
#if defined(__aarch64__)
        "  b __gxx_personality_v0\n"
#else
        "  jmp __gxx_personality_v0@PLT\n"
#endif
);

namespace {

/// Precedes every object.
struct Header {
  long references;
  Class original;  ///< of a deallocated object
};
static_assert(sizeof(Header) % alignof(std::max_align_t) == 0);

Header* header_of(id object) { return reinterpret_cast<Header*>((char*)object - sizeof(Header)); }

/// Autoreleased objects of this thread's pools, and how many pools there are.
thread_local std::vector<id> autoreleased;
thread_local size_t pools = 0;

/// Deallocated objects, kept a while so that a message to one is recognised.
class Quarantine {
 public:
  void add(Header* header) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::free(ring_[next_]);
    ring_[next_] = header;
    next_ = (next_ + 1) % ring_.size();
  }

 private:
  std::mutex mutex_;
  std::array<Header*, 4096> ring_{};
  size_t next_ = 0;
};

Quarantine& quarantine() {
  static auto* quarantine = new Quarantine;
  return *quarantine;
}

}  // namespace

/// Class of deallocated objects; answers no message at all.
__attribute__((objc_root_class))
@interface SoftZombie {
  Class isa;
}
@end
@implementation SoftZombie
@end

namespace {

IMP message_not_understood(id receiver, SEL selector) {
  Class is = object_getClass(receiver);
  if (is == objc_getClass("SoftZombie")) {
    fatal("message %s sent to a deallocated %s", sel_getName(selector),
          class_getName(header_of(receiver)->original));
  }
  fatal("%c[%s %s]: unrecognized selector", class_isMetaClass(is) ? '+' : '-', class_getName(is),
        sel_getName(selector));
}

[[maybe_unused]] const bool hooked = [] {
  __objc_msg_forward2 = message_not_understood;
  return true;
}();

}  // namespace

@implementation NSObject
+ (instancetype)alloc {
  auto* header = static_cast<Header*>(std::calloc(1, sizeof(Header) + class_getInstanceSize(self)));
  header->references = 1;
  id object = (id)(header + 1);
  object_setClass(object, self);
  ++counters().live_objects;
  return object;
}
+ (instancetype)new {
  return [[self alloc] init];
}
+ (Class)class {
  return self;
}
- (instancetype)init {
  return self;
}
- (void)dealloc {
  Header* header = header_of(self);
  header->original = object_getClass(self);
  object_setClass(self, objc_getClass("SoftZombie"));
  --counters().live_objects;
  quarantine().add(header);
}
- (id)retain {
  __atomic_add_fetch(&header_of(self)->references, 1, __ATOMIC_SEQ_CST);
  return self;
}
- (oneway void)release {
  if (__atomic_sub_fetch(&header_of(self)->references, 1, __ATOMIC_SEQ_CST) == 0) [self dealloc];
}
- (id)autorelease {
  if (pools == 0) {
    fatal("a %s was autoreleased with no pool in place: it would leak; use @autoreleasepool",
          class_getName(object_getClass(self)));
  }
  autoreleased.push_back(self);
  return self;
}
- (NSUInteger)retainCount {
  return header_of(self)->references;
}
- (Class)class {
  return object_getClass(self);
}
- (BOOL)respondsToSelector:(SEL)selector {
  return class_respondsToSelector(object_getClass(self), selector);
}
@end

@implementation NSAutoreleasePool
- (instancetype)init {
  mark = autoreleased.size();
  ++pools;
  return self;
}
- (void)drain {
  while (autoreleased.size() > mark) {
    id object = autoreleased.back();
    autoreleased.pop_back();
    [object release];
  }
  --pools;
  [self release];
}
@end

@interface SoftString : NSString {
 @public
  char* copy;
}
@end

@implementation NSString
+ (instancetype)stringWithUTF8String:(const char*)string {
  if (!string) fatal("+[NSString stringWithUTF8String:]: NULL");
  SoftString* made = [[SoftString new] autorelease];
  made->copy = strdup(string);
  return (id)made;
}
- (const char*)UTF8String {
  fatal("-[NSString UTF8String] of an abstract string");
}
@end

@implementation SoftString
- (const char*)UTF8String {
  return copy;
}
- (void)dealloc {
  std::free(copy);
  [super dealloc];
}
@end

@implementation NSConstantString  // literals live in static memory and have no header
- (const char*)UTF8String {
  return bytes;
}
- (id)retain {
  return self;
}
- (oneway void)release {
}
- (id)autorelease {
  return self;
}
@end

@interface SoftArray : NSArray {
 @public
  std::vector<id>* items;
}
@end

@implementation NSArray
- (NSUInteger)count {
  fatal("-[NSArray count] of an abstract array");
}
- (id)objectAtIndex:(NSUInteger)index {
  fatal("-[NSArray objectAtIndex:%lu] of an abstract array", index);
}
@end

@implementation SoftArray
- (NSUInteger)count {
  return items->size();
}
- (id)objectAtIndex:(NSUInteger)index {
  if (index >= items->size()) {
    fatal("-[NSArray objectAtIndex:%lu]: the array has %zu objects", index, items->size());
  }
  return (*items)[index];
}
- (void)dealloc {
  for (id item : *items) [item release];
  delete items;
  [super dealloc];
}
@end

@interface SoftError : NSError {
 @public
  NSString* message;
}
@end

@implementation NSError
- (NSInteger)code {
  return 1;
}
- (NSString*)localizedDescription {
  return @"unknown error";
}
@end

@implementation SoftError
- (NSString*)localizedDescription {
  return message;
}
- (void)dealloc {
  [message release];
  [super dealloc];
}
@end

@implementation NSProcessInfo
+ (NSProcessInfo*)processInfo {
  static NSProcessInfo* info = [NSProcessInfo new];
  return info;
}
- (NSString*)operatingSystemVersionString {
  return @"(software Metal on Linux)";
}
@end

namespace softmetal {

NSString* make_string(const std::string& text) {
  return [NSString stringWithUTF8String:text.c_str()];
}

NSError* make_error(const std::string& message) {
  SoftError* error = [[SoftError new] autorelease];
  error->message = [make_string(message) retain];
  return error;
}

NSArray* make_array(const std::vector<std::string>& strings) {
  SoftArray* array = [[SoftArray new] autorelease];
  array->items = new std::vector<id>;
  for (const std::string& string : strings) array->items->push_back([make_string(string) retain]);
  return array;
}

Counters& counters() {
  static auto* counters = new Counters;
  return *counters;
}

}  // namespace softmetal

/// Read through ctypes by __init__.py.
extern "C" SOFTMETAL_API softmetal::Counters* softmetal_counters() {
  return &softmetal::counters();
}
