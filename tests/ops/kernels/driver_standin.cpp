// A stand-in for NVIDIA's driver (libcuda.so.1) that runs emulated kernels, so that the real calls of cuda.bindings can be
// tested without a device. What the real driver would load is the path of a library of emulated kernels.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

static thread_local void* current;  // context, as the real driver's a thread's own
static int context, shared_limit = 48 * 1024;

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** made, int) { return *made = &context, 0; }
int cuCtxSetCurrent(void* wanted) { return current = wanted, 0; }
int cuModuleLoadData(void** module, const void* image) {
    if (!current) return 201;  // CUDA_ERROR_INVALID_CONTEXT
    *module = dlopen((const char*)image, RTLD_NOW);
    return *module ? 0 : 200;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (!current) return 201;
    *function = dlsym(module, name);
    return *function ? 0 : 500;
}
int cuModuleGetGlobal_v2(uint64_t* address, size_t* bytes, void* module, const char* name) {
    if (!current) return 201;
    void* found = dlsym(module, name);
    if (!found) return 500;
    *address = (uint64_t)found;
    *bytes = sizeof(int) * *(int*)dlsym(module, (std::string(name) + "_size").c_str());
    return 0;
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return current ? std::memcpy(to, (void*)from, bytes), 0 : 201; }
int cuFuncSetAttribute(void*, int attribute, int value) {
    if (!current) return 201;
    if (attribute != 8) return 1;
    shared_limit = value;
    return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    if (!current) return 201;
    if ((int)shared > shared_limit || extra) return 1;
    const int grid[] = {(int)x, (int)y, (int)z};
    if (std::getenv("DRIVER_LOG")) std::printf("%u threads, %u bytes, stream %p\n", threads, shared, stream), std::fflush(stdout);
    ((void (*)(void*, const int*))function)(parameters[0], grid);
    return 0;
}
int cuGetErrorString(int, const char** text) { return *text = "an error", 0; }
int cuGetErrorName(int, const char** text) { return *text = "ERROR", 0; }
int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    *function = dlsym(RTLD_DEFAULT, name);
    for (const char* suffix : {"_v2", ""})
        if (void* found = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), (std::string(name) + suffix).c_str())) {
            *function = found;
            break;
        }
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
}
