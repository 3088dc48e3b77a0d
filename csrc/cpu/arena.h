// Where the values of a sequence live while it runs: all in one block, the arena.
//
// A value has a place there from the step that writes it to the last one that reads it. Values that
// are put side by side, channel by channel, are parts of a whole from the start: each is written
// where the whole has it, a pixel every whole.channels values, and joining them copies nothing.
//
//   whole, 96 channels       | part 0: 64           | part 1: 32 |
//     pixel 0                | ==================== | ========== |
//     pixel 1                | ==================== | ========== |
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resnet_fast::cpu {

struct Value {
  int64_t channels = 0, height = 0, width = 0;
  int64_t last = -1;          // the step that reads it last; that writes it, where none does
  int64_t reads = 0;          // how often it is read
  int64_t whole = -1;         // the value that it is a part of; itself, where of none
  int64_t channel = 0;        // the first of the whole's that are its own
  int64_t at = -1, size = 0;  // of a whole: elements from the arena's start

  int64_t pixels(int64_t batch) const { return batch * height * width; }
};

class Arena {
 public:
  int64_t size() const { return size_; }
  Value& operator[](int64_t value) { return values_[value]; }
  const Value& operator[](int64_t value) const { return values_[value]; }

  int64_t add(Value value) {
    value.whole = static_cast<int64_t>(values_.size());
    values_.push_back(value);
    return value.whole;
  }

  void read(int64_t value, int64_t step) {
    values_[value].last = std::max(values_[value].last, step);
    ++values_[value].reads;
  }

  bool is_part(int64_t value) const { return values_[value].whole != value; }

  // Whether `value` lies where `joined` has its channels from `channel` on.
  bool lies_in(int64_t value, int64_t joined, int64_t channel) const {
    const Value &v = values_[value], &w = values_[joined];
    return value != joined && v.whole == w.whole && v.channel == w.channel + channel;
  }

  // Makes `value` the channels from `channel` on of `joined`, which is in its final place itself.
  void make_part(int64_t value, int64_t joined, int64_t channel) {
    Value& v = values_[value];
    v.whole = values_[joined].whole;
    v.channel = values_[joined].channel + channel;
    Value& whole = values_[v.whole];
    whole.last = std::max(whole.last, v.last);
  }

  // Values from one pixel to the next; 0 where the value is dense.
  int64_t pitch(int64_t value) const {
    const int64_t whole = values_[values_[value].whole].channels;
    return whole == values_[value].channels ? 0 : whole;
  }

  // A place at `step` for the whole that `value`, which it writes, is a part of: that of `under`
  // where it may be written over (-1 where nothing is), else the lowest gap among what lives.
  // Sizes are multiples of `line` elements.
  void place(int64_t value, int64_t step, int64_t under, int64_t batch, int64_t line) {
    Value& whole = values_[values_[value].whole];
    if (whole.at >= 0) return;
    whole.size = (whole.pixels(batch) * whole.channels + line - 1) / line * line;
    std::erase_if(live_, [&](int64_t v) { return values_[v].last < step; });
    if (under >= 0) {
      whole.at = values_[under].at;
      std::replace(live_.begin(), live_.end(), under, values_[value].whole);
      return;
    }
    int64_t at = 0;
    auto before = live_.begin();
    for (; before != live_.end() && at + whole.size > values_[*before].at; ++before) {
      at = values_[*before].at + values_[*before].size;
    }
    whole.at = at;
    live_.insert(before, values_[value].whole);
    size_ = std::max(size_, at + whole.size);
  }

 private:
  std::vector<Value> values_;
  std::vector<int64_t> live_;  // wholes, by place
  int64_t size_ = 0;
};

}  // namespace resnet_fast::cpu
