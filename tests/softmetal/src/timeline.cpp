#include "timeline.h"

#include <iterator>
#include <thread>

#include "config.h"

namespace softmetal {

Timeline& Timeline::instance() {
  static auto* timeline = new Timeline;  // leaked: its thread outlives static destructors
  return *timeline;
}

Timeline::Timeline() {
  std::thread([this] { run(); }).detach();
}

void Timeline::submit(std::function<void()> work) {
  std::lock_guard<std::mutex> lock(mutex_);
  // Work behind held work has to wait too: command buffers run in order.
  if (config().lazy || !held_.empty()) {
    held_.push_back(std::move(work));
    return;
  }
  ready_.push_back(std::move(work));
  wake_.notify_one();
}

void Timeline::release() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::move(held_.begin(), held_.end(), std::back_inserter(ready_));
  held_.clear();
  wake_.notify_one();
}

void Timeline::run() {
  for (;;) {
    std::function<void()> work;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return !ready_.empty(); });
      work = std::move(ready_.front());
      ready_.pop_front();
    }
    work();
  }
}

}  // namespace softmetal
