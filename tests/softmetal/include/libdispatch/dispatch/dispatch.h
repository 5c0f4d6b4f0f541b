// The part of libdispatch that host code of the MPS backend uses, for Linux.
#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct softmetal_queue* dispatch_queue_t;
typedef struct softmetal_queue_attributes* dispatch_queue_attr_t;
typedef struct softmetal_data* dispatch_data_t;
typedef void (*dispatch_function_t)(void*);
typedef void (^dispatch_block_t)(void);

#define DISPATCH_QUEUE_SERIAL NULL
#define DISPATCH_DATA_DESTRUCTOR_DEFAULT NULL

dispatch_queue_t dispatch_queue_create(const char* label, dispatch_queue_attr_t attributes);
void dispatch_sync(dispatch_queue_t queue, dispatch_block_t block);
void dispatch_sync_f(dispatch_queue_t queue, void* context, dispatch_function_t work);

/// Copies the bytes, as libdispatch does when the destructor is the default one.
dispatch_data_t dispatch_data_create(const void* buffer, size_t size, dispatch_queue_t queue,
                                     dispatch_block_t destructor);
/// Both a queue and a data object on Apple's side; only data objects are ever released here.
void dispatch_release(dispatch_data_t object);

#ifdef __cplusplus
}
#endif
