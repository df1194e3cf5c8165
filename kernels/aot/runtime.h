/* What the generated sources share: a kernel's record, its launch, the arithmetic of arguments. Not installed. */
#ifndef UNITE_KERNELS_RUNTIME_H
#define UNITE_KERNELS_RUNTIME_H

#include <stdint.h>

#include "unite_kernels.h"

/* Products of three 32-bit sizes overflow 64 bits; they are formed whole and compared with their limits afterwards. */
__extension__ typedef __int128 unite_wide;

/* One compiled form of a kernel: machine code, or PTX that the driver compiles when it is first used. */
typedef struct {
    int capability;    /* 10 · major + minor of the architecture it was compiled for */
    int is_ptx;
    unsigned shared;   /* bytes of dynamic shared memory a block */
    const void *data;
} unite_image;

/* The function in one context; one node for every context that launched the kernel. */
typedef struct unite_loaded {
    unsigned long long context; /* the driver's id of it, which is never given twice, as addresses are */
    void *function;
    unsigned shared;
    struct unite_loaded *next;
} unite_loaded;

typedef struct {
    const char *symbol;
    unsigned threads;
    int count;
    const unite_image *images;
    unite_loaded *loaded;
} unite_kernel;

/* Launch on the stream's context, loading the kernel there if that has not happened. The driver must be initialised. */
int unite_launch(unite_kernel *kernel, CUstream stream, unite_wide x, unite_wide y, void **arguments);

static inline unite_wide unite_cdiv(unite_wide count, int size)
{
    return (count + size - 1) / size;
}

/* Kernels were compiled for addresses and strides that are multiples of 16; absent pointers are no arguments at all. */
static inline int unite_address_ok(CUdeviceptr address)
{
    return address != 0 && address % 16 == 0;
}

#endif
