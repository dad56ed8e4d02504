// The GPU that a call's tensors are on, current while the call is made.
#pragma once

namespace ofakern {

class CallDevice {
 public:
  explicit CallDevice(int index);
  ~CallDevice();
  CallDevice(const CallDevice&) = delete;
  CallDevice& operator=(const CallDevice&) = delete;

 private:
  int index_, previous_ = 0;
};

}  // namespace ofakern
