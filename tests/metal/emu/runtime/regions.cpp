// Memory of a launch: named regions, and blocks between guard pages.
#include <string.h>
#include <sys/mman.h>

#include <algorithm>

#include "runtime.h"

namespace emu {

std::vector<Region> regions;

namespace {

constexpr size_t kGuard = 16 << 20;
constexpr size_t kCacheLimit = 64 << 20;
constexpr unsigned char kCanary = 0xa5;
constexpr size_t kAlignment = 16;

std::vector<Guarded> cache;
size_t cached_bytes = 0;
size_t last_hit = 0;

void unmap(const Guarded& block) { munmap(block.map, block.body + 2 * kGuard); }

}  // namespace

Region* find_region(uintptr_t address) {
  if (last_hit < regions.size() && address >= regions[last_hit].low &&
      address < regions[last_hit].high)
    return &regions[last_hit];
  for (size_t i = 0; i < regions.size(); ++i)
    if (address >= regions[i].low && address < regions[i].high) {
      last_hit = i;
      return &regions[i];
    }
  return nullptr;
}

const Region* nearest_region(uintptr_t address) {
  const Region* best = nullptr;
  uintptr_t best_distance = ~(uintptr_t)0;
  for (const Region& region : regions) {
    const uintptr_t distance = address < region.low ? region.low - address : address - region.low;
    if (distance < best_distance) {
      best = &region;
      best_distance = distance;
    }
  }
  return best;
}

void add_region(void* data, size_t size, Space space, bool read_only, uint granule,
                std::string name) {
  Region region{(uintptr_t)data, (uintptr_t)data + size, space, read_only,
                granule,         std::move(name)};
  regions.push_back(std::move(region));
}

void clear_regions() {
  for (Region& region : regions)
    if (region.cells) munmap((void*)region.cells, region.cells_bytes);
  regions.clear();
}

Guarded guarded_allocate(size_t size, uint misalignment, bool guard_low) {
  const size_t body =
      std::max(kPage, (size + misalignment + kAlignment + kPage - 1) / kPage * kPage);
  Guarded block;
  for (size_t i = 0; i < cache.size(); ++i)
    if (cache[i].body == body) {
      block = cache[i];
      cache[i] = cache.back();
      cache.pop_back();
      cached_bytes -= body;
      break;
    }
  if (!block.map) {
    block.map = (char*)mmap(nullptr, body + 2 * kGuard, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(block.map + kGuard, body, PROT_READ | PROT_WRITE);
    block.body = body;
  }
  char* const low = block.map + kGuard;
  const size_t slack = guard_low ? 0 : (body - size - misalignment) / kAlignment * kAlignment;
  block.data = low + slack + misalignment;
  block.size = size;
  memset(low, kCanary, block.data - low);
  memset(block.data + size, kCanary, low + body - (block.data + size));
  return block;
}

bool guarded_damage(const Guarded& block, long* offset) {
  const char* const low = block.map + kGuard;
  for (const char* p = low; p < low + block.body; ++p) {
    if (p == block.data) p += block.size;
    if (p < low + block.body && (unsigned char)*p != kCanary) {
      *offset = p - block.data;
      return true;
    }
  }
  return false;
}

void guarded_release(const Guarded& block) {
  if (cached_bytes + block.body > kCacheLimit) {
    unmap(block);
    return;
  }
  cache.push_back(block);
  cached_bytes += block.body;
}

void* unreadable_page() {
  static void* page =
      mmap(nullptr, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return page;
}

void* zero_page() {
  static void* page = mmap(nullptr, 1 << 16, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return page;
}

}  // namespace emu
