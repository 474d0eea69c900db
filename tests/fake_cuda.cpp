// A CUDA device that holds nothing: enough for torch built without CUDA to run its dispatcher and autograd on fake
// tensors of device cuda. It answers which device is current, that there is one, and which attention would be taken.
// Nothing can be allocated or computed on it. Loaded before torch is imported (fake_cuda_steps.py).
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

// Flash attention (1) for 16 bits without a mask, else the memory-efficient one (2).
int64_t choose_attention(const at::Tensor& query, const at::Tensor&, const at::Tensor&,
                         const std::optional<at::Tensor>& mask, double, bool, std::optional<double>, bool) {
  return query.element_size() == 2 && !mask ? 1 : 2;
}

c10::impl::DeviceGuardImplRegistrar guard_is_registered(c10::DeviceType::CUDA, new Guard());
const int choice_is_registered =
    (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention), 0);

}  // namespace

namespace at {
using FakeHooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, FakeHooks)
}  // namespace at
