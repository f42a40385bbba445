// Lets a CPU build of torch differentiate fake CUDA tensors: one device without streams or memory.
// FakeTensorMode brings shapes and dtypes, torch itself the autocast policy of CUDA; only the two
// interfaces below are missing, through which autograd asks for devices and streams.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using namespace c10;

constexpr auto CUDA = DeviceType::CUDA;

struct OneDevice final : impl::NoOpDeviceGuardImpl<CUDA> {
  Device getDevice() const override { return Device(CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(CUDA, 0)); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(Device(CUDA, 0)); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
};

const impl::DeviceGuardImplRegistrar guard(CUDA, new OneDevice());
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace
