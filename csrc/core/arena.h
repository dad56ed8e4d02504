// Scratch memory cut from one workspace, every piece aligned to 64 bytes.
#pragma once

#include "core/vec.h"

namespace ofakern::OFAKERN_ISA {
namespace {

// Over a null base it only measures: one function can both size and cut a workspace.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class X>
  X* take(i64 count) {
    X* piece = base_ == nullptr ? nullptr : reinterpret_cast<X*>(base_ + used_);
    used_ += round_up(count * static_cast<i64>(sizeof(X)), 64);
    return piece;
  }
  i64 used() const { return used_; }

 private:
  char* base_;
  i64 used_ = 0;
};

}  // namespace
}  // namespace ofakern::OFAKERN_ISA
