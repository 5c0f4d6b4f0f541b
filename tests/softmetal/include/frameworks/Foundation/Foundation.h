// The part of Foundation that this project's host code uses: declarations as Apple's headers have
// them. Serves the Linux build (implemented in src/foundation.mm) and the macOS cross link.
#pragma once

#include <dispatch/dispatch.h>
#include <objc/objc.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __APPLE__
#include <objc/NSObject.h>
#else
typedef long NSInteger;
typedef unsigned long NSUInteger;

@protocol NSObject
- (id)retain;
- (oneway void)release;
- (id)autorelease;
- (NSUInteger)retainCount;
- (Class)class;
- (BOOL)respondsToSelector:(SEL)selector;
@end

__attribute__((objc_root_class))
@interface NSObject<NSObject> {
  Class isa;
}
+ (instancetype)alloc;
+ (instancetype)new;
+ (Class)class;
- (instancetype)init;
- (void)dealloc;
@end

/// What `@autoreleasepool` becomes under the gcc runtime.
@interface NSAutoreleasePool : NSObject {
  size_t mark;
}
- (void)drain;
@end
#endif

typedef struct {
  NSUInteger location;
  NSUInteger length;
} NSRange;

static inline NSRange NSMakeRange(NSUInteger location, NSUInteger length) {
  NSRange range = {location, length};
  return range;
}

@interface NSString : NSObject
+ (instancetype)stringWithUTF8String:(const char*)string;
@property(readonly) const char* UTF8String;
@end

#ifndef __APPLE__
/// Class of the @"literals"; clang lays the three words out itself.
@interface NSConstantString : NSString {
  const char* bytes;
  unsigned int length;
}
@end
#endif

@interface NSArray : NSObject
@property(readonly) NSUInteger count;
- (id)objectAtIndex:(NSUInteger)index;
@end

@interface NSError : NSObject
@property(readonly) NSInteger code;
@property(readonly, copy) NSString* localizedDescription;
@end

@interface NSProcessInfo : NSObject
@property(class, readonly) NSProcessInfo* processInfo;
@property(readonly, copy) NSString* operatingSystemVersionString;
@end
