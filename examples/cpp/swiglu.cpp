// SwiGLU through the C library: silu(first half) * second half on a GPU, compared with the same sum on the CPU.
// Exit status: 0 the results agree, 1 they do not, 2 the GPU could not be used (the code is printed).

#include <unite_kernels.h>

#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr int32_t rows = 37;
constexpr int32_t width = 2048;

// Programs that use the CUDA runtime or link the driver need none of this: device memory, here without a toolkit.
template <typename Function>
Function driver(const char *name)
{
    static void *library = dlopen("libcuda.so.1", RTLD_NOW);
    return reinterpret_cast<Function>(dlsym(library, name));
}

void check(const char *what, int code)
{
    if (code == 0)
        return;
    std::printf("%s: error %d: %s\n", what, code, unite_error_string(code));
    std::exit(2);
}

uint16_t to_bfloat16(float value)
{
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16); // to nearest, ties to even
}

float to_float(uint16_t value)
{
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

} // namespace

int main()
{
    check("unite_initialize", unite_initialize());

    void *context;
    check("context", driver<int (*)(void **, int)>("cuDevicePrimaryCtxRetain")(&context, 0));
    check("context", driver<int (*)(void *)>("cuCtxSetCurrent")(context));
    const auto allocate = driver<int (*)(CUdeviceptr *, size_t)>("cuMemAlloc_v2");
    const auto upload = driver<int (*)(CUdeviceptr, const void *, size_t)>("cuMemcpyHtoD_v2");
    const auto download = driver<int (*)(void *, CUdeviceptr, size_t)>("cuMemcpyDtoH_v2");

    std::vector<uint16_t> x(size_t{2} * rows * width), out(size_t{rows} * width);
    for (size_t i = 0; i < x.size(); i++)
        x[i] = to_bfloat16(6.0f * std::sin(0.37f * static_cast<float>(i)));
    CUdeviceptr device_x, device_out;
    check("allocate", allocate(&device_x, x.size() * sizeof x[0]));
    check("allocate", allocate(&device_out, out.size() * sizeof out[0]));
    check("upload", upload(device_x, x.data(), x.size() * sizeof x[0]));

    check("unite_swiglu_forward_bf16_2048", unite_swiglu_forward_bf16_2048(nullptr, device_x, device_out, rows));

    check("download", download(out.data(), device_out, out.size() * sizeof out[0])); // waits for the kernel
    double worst = 0.0;
    for (int32_t row = 0; row < rows; row++)
        for (int32_t column = 0; column < width; column++) {
            const double gate = to_float(x[size_t{2} * row * width + column]);
            const double up = to_float(x[size_t{2} * row * width + width + column]);
            const double expected = gate / (1.0 + std::exp(-gate)) * up;
            const double found = to_float(out[size_t{1} * row * width + column]);
            // NaN must not pass for a small error.
            const double error =
                std::isfinite(found) ? std::fabs(found - expected) / (std::fabs(expected) + 1e-6) : HUGE_VAL;
            worst = std::fmax(worst, error);
        }
    check("free", driver<int (*)(CUdeviceptr)>("cuMemFree_v2")(device_x));
    check("free", driver<int (*)(CUdeviceptr)>("cuMemFree_v2")(device_out));
    // Rounding to bfloat16 is off by 2^-9 at most; as much again covers exp in float32 many times over.
    const bool agrees = worst <= 0x1p-8;
    std::printf("largest relative error %.2e: %s\n", worst, agrees ? "agrees" : "WRONG");
    return agrees ? 0 : 1;
}
