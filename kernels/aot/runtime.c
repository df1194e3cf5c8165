#include "runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

/* Values of the driver's interface, which is stable; its header is not needed to build this library. */
enum {
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
    MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
    DEFAULT_SHARED_LIMIT = 48 * 1024, /* more must be asked for */
    GRID_X_LIMIT = 2147483647,
    GRID_Y_LIMIT = 65535
};

/* ctxGetId is the youngest entry: driver 525, of CUDA 12.0. */
#define DRIVER_FUNCTIONS(ENTRY)                                                                                   \
    ENTRY(init, "cuInit", (unsigned flags))                                                                       \
    ENTRY(errorString, "cuGetErrorString", (int code, const char **text))                                         \
    ENTRY(deviceGetAttribute, "cuDeviceGetAttribute", (int *value, int attribute, int device))                    \
    ENTRY(ctxGetDevice, "cuCtxGetDevice", (int *device))                                                          \
    ENTRY(ctxGetId, "cuCtxGetId", (void *context, unsigned long long *id))                                        \
    ENTRY(ctxPush, "cuCtxPushCurrent_v2", (void *context))                                                        \
    ENTRY(ctxPop, "cuCtxPopCurrent_v2", (void **context))                                                         \
    ENTRY(streamGetCtx, "cuStreamGetCtx", (CUstream stream, void **context))                                      \
    ENTRY(moduleLoadData, "cuModuleLoadData", (void **module, const void *image))                                 \
    ENTRY(moduleUnload, "cuModuleUnload", (void *module))                                                         \
    ENTRY(moduleGetFunction, "cuModuleGetFunction", (void **function, void *module, const char *name))            \
    ENTRY(funcSetAttribute, "cuFuncSetAttribute", (void *function, int attribute, int value))                     \
    ENTRY(launchKernel, "cuLaunchKernel",                                                                         \
          (void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, \
           unsigned shared, CUstream stream, void **arguments, void **extra))

#define DECLARE(name, symbol, parameters) int(*name) parameters;
static struct {
    DRIVER_FUNCTIONS(DECLARE)
} driver;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int initialised; /* read and written under the lock, as is the list of every kernel */

static int load_driver(void)
{
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return UNITE_ERROR_DRIVER_MISSING;
    /* ISO C has no cast from the data pointer that POSIX returns to a function pointer, hence void **. */
#define FIND(name, symbol, parameters)                                                                            \
    *(void **)&driver.name = dlsym(library, symbol);                                                              \
    if (!driver.name) {                                                                                           \
        dlclose(library);                                                                                         \
        return UNITE_ERROR_DRIVER_OLD;                                                                            \
    }
    DRIVER_FUNCTIONS(FIND)
    int code = driver.init(0);
    if (code != 0)
        dlclose(library);
    return code;
}

int unite_initialize(void)
{
    pthread_mutex_lock(&lock);
    int code = 0;
    if (!initialised) {
        code = load_driver();
        initialised = code == 0;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

const char *unite_error_string(int code)
{
    switch (code) {
    case 0:
        return "success";
    case UNITE_ERROR_DRIVER_MISSING:
        return "the CUDA driver is not installed: libcuda.so.1 was not found";
    case UNITE_ERROR_DRIVER_OLD:
        return "the CUDA driver is older than 12.0 (525)";
    case UNITE_ERROR_ARCHITECTURE:
        return "the device is older than every architecture this library was built for";
    case UNITE_ERROR_ARGUMENT:
        return "an argument is out of range: an integer is negative or too large, an address is 0, or an address, a "
               "stride or a size is no multiple of 16 where the header asks for one";
    case UNITE_ERROR_MEMORY:
        return "out of host memory";
    }
    const char *text = 0;
    pthread_mutex_lock(&lock);
    if (initialised && code > 0)
        driver.errorString(code, &text);
    pthread_mutex_unlock(&lock);
    return text ? text : "an error of the CUDA driver";
}

/* Machine code of this device before PTX. Code for 8.0 runs on all of 8.x; from 9.0 on Triton compiles for one
   architecture alone (sm_90a), and only equality will do. PTX runs on what is as new as it or newer. */
static const unite_image *choose(const unite_kernel *kernel, int capability)
{
    const unite_image *best = 0;
    for (int i = 0; i < kernel->count; i++) {
        const unite_image *image = &kernel->images[i];
        int same_major = image->capability / 10 == capability / 10;
        int runs = image->is_ptx || image->capability < 90 ? image->capability <= capability
                                                           : image->capability == capability;
        if (!runs || (!image->is_ptx && !same_major))
            continue;
        if (!best || best->is_ptx > image->is_ptx ||
            (best->is_ptx == image->is_ptx && best->capability < image->capability))
            best = image;
    }
    return best;
}

/* Into the current context, with the lock held. */
static int load_kernel(const unite_kernel *kernel, unite_loaded *loaded)
{
    int device, major, minor;
    int code = driver.ctxGetDevice(&device);
    if (code == 0)
        code = driver.deviceGetAttribute(&major, COMPUTE_CAPABILITY_MAJOR, device);
    if (code == 0)
        code = driver.deviceGetAttribute(&minor, COMPUTE_CAPABILITY_MINOR, device);
    if (code != 0)
        return code;
    const unite_image *image = choose(kernel, 10 * major + minor);
    if (!image)
        return UNITE_ERROR_ARCHITECTURE;
    void *module;
    code = driver.moduleLoadData(&module, image->data);
    if (code != 0)
        return code;
    loaded->shared = image->shared;
    code = driver.moduleGetFunction(&loaded->function, module, kernel->symbol);
    if (code == 0 && image->shared > DEFAULT_SHARED_LIMIT)
        code = driver.funcSetAttribute(loaded->function, MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)image->shared);
    if (code != 0)
        driver.moduleUnload(module);
    return code;
}

/* The kernel in the current context. Nodes of destroyed contexts stay, 32 bytes each; their modules went with them. */
static int find_kernel(unite_kernel *kernel, unsigned long long context, void **function, unsigned *shared)
{
    int code = 0;
    pthread_mutex_lock(&lock);
    unite_loaded *loaded = kernel->loaded;
    while (loaded && loaded->context != context)
        loaded = loaded->next;
    if (!loaded) {
        loaded = malloc(sizeof *loaded);
        code = loaded ? load_kernel(kernel, loaded) : UNITE_ERROR_MEMORY;
        if (code == 0) {
            loaded->context = context;
            loaded->next = kernel->loaded;
            kernel->loaded = loaded;
        } else {
            free(loaded);
        }
    }
    if (code == 0) {
        *function = loaded->function;
        *shared = loaded->shared;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int unite_launch(unite_kernel *kernel, CUstream stream, unite_wide x, unite_wide y, void **arguments)
{
    if (x > GRID_X_LIMIT || y > GRID_Y_LIMIT)
        return UNITE_ERROR_ARGUMENT;
    void *context, *function, *popped;
    unsigned long long id;
    unsigned shared;
    int code = driver.streamGetCtx(stream, &context);
    if (code == 0)
        code = driver.ctxGetId(context, &id);
    if (code != 0)
        return code;
    /* A stream may belong to another context than the calling thread's. */
    code = driver.ctxPush(context);
    if (code != 0)
        return code;
    code = find_kernel(kernel, id, &function, &shared);
    if (code == 0)
        code = driver.launchKernel(function, (unsigned)x, (unsigned)y, 1, kernel->threads, 1, 1, shared, stream,
                                   arguments, 0);
    int restored = driver.ctxPop(&popped);
    return code != 0 ? code : restored;
}
