// A card in the host's memory: CUDA tensors of a CPU build of torch, each operation on them made by
// the CPU. One device, without streams of its own. It refuses what a card refuses: operations on two
// devices at once; memory of the card read as the host's (torch itself knows by the device).
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {
using at::CUDAHooksArgs;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
using at::Tensor;
using namespace c10;

constexpr auto CUDA = DeviceType::CUDA;
const Device CARD(CUDA, 0);

// ------------------------------------------------------------ what autograd and others ask for

struct OneDevice final : impl::NoOpDeviceGuardImpl<CUDA> {
  Device getDevice() const override { return CARD; }
  Device exchangeDevice(Device) const override { return CARD; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, CARD); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, CARD); }
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
  bool isPinnedPtr(const void*) const override { return false; }
  Allocator* getPinnedMemoryAllocator() const override { return GetDefaultCPUAllocator(); }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
};

const impl::DeviceGuardImplRegistrar guard(CUDA, new OneDevice());
REGISTER_CUDA_HOOKS(CUDAHooks);

// ------------------------------------------------------------------------------------- memory

void release(void* memory) { GetDefaultCPUAllocator()->raw_deallocate(memory); }

struct CardMemory final : Allocator {
  DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? GetDefaultCPUAllocator()->raw_allocate(bytes) : nullptr;
    return {memory, memory, &release, CARD};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};
CardMemory memory;
REGISTER_ALLOCATOR(CUDA, &memory);
const DispatchKeySet KEYS(DispatchKey::CUDA);

Tensor empty(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
             std::optional<Device>, std::optional<bool>, std::optional<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, KEYS, dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype,
                     std::optional<Layout>, std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), size, std::nullopt);
  return self;
}

// The same memory as a tensor of the host.
Tensor on_host(const Tensor& x) {
  if (!x.is_cuda()) return x;
  void* data = const_cast<void*>(x.const_data_ptr());
  return at::from_blob(data, x.sizes(), x.strides(), [x](void*) {}, x.options().device(kCPU));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool) {
  at::AutoDispatchBelowADInplaceOrView without_gradient;
  on_host(self).copy_(on_host(source));
  return self;
}

Tensor copy_and_resize(const Tensor& source, const Tensor& to) {
  if (source.sizes() != to.sizes()) to.resize_(source.sizes());
  on_host(to).copy_(on_host(source));
  return to;
}

at::Scalar value(const Tensor& self) { return at::_local_scalar_dense(on_host(self)); }

// --------------------------------------------------------------------------------- operations

void record_stream(Tensor&, Stream) {}

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        double, bool, std::optional<double>, bool) {
  return 0;
}

// Whether tensors are on two devices. Indices may be the host's, and so may single numbers.
bool is_mixed(const OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& name = op.schema().operator_name().name;
  if (name.find("aten::index") == 0 || name.find("aten::_index") == 0) return false;
  bool card = false, host = false;
  auto look = [&](const Tensor& x) {
    card |= x.defined() && x.is_cuda();
    host |= x.defined() && x.is_cpu() && x.dim() > 0;
  };
  for (const auto& given : torch::jit::last(stack, op.schema().arguments().size())) {
    if (given.isTensor()) look(given.toTensor());
    if (given.isTensorList())
      for (const Tensor& x : given.toTensorVector()) look(x);
  }
  return card && host;
}

void by_the_host(const OperatorHandle& op, torch::jit::Stack* stack) {
  TORCH_CHECK(!is_mixed(op, *stack), op.schema().operator_name(),
              ": Expected all tensors to be on the same device, but found at least two devices, "
              "cuda:0 and cpu!");
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("copy_", copy_);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("_local_scalar_dense", value);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("set_.source_Tensor", TORCH_FN(at::native::set_tensor_));
  m.impl("set_", TORCH_FN(at::native::set_cpu_));
  m.impl("record_stream", record_stream);
  m.impl("_fused_sdp_choice", plain_attention);  // the kernel that is made of plain operations
  // torch's own asks the device for kernels that are not there.
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&by_the_host>());
}
}  // namespace
