#include "cuda.h"

#include <dlfcn.h>

#include "cuda/inject.h"

namespace diffmas::binding {

void check_cuda(int error) { STD_TORCH_CHECK(error == 0, "CUDA: ", diffmas_cuda_error(error)); }

std::tuple<int64_t, int64_t> cuda_versions() {
  int driver = 0, runtime = 0;
  check_cuda(diffmas_cuda_versions(&driver, &runtime));
  return {driver, runtime};
}

void* current_stream(Device device) {
  // The function lives in libtorch_cuda, which a CPU build of torch does not have.
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(device.index, &stream) == 0, "CUDA: torch has no current stream for device ", device.index);
  return stream;
}

}  // namespace diffmas::binding
