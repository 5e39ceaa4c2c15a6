/* A GPU that computes nothing. PyTorch's CUDA build takes it for a card, allocates its memory and builds kernels for it.
 *
 * It stands in for CUDA's runtime and driver, NVML and cuBLAS. Memory is address space that nobody touches; it is counted
 * and refused as on a card of HOLLOW_MEMORY bytes. Kernels return at once, so what tensors hold has no meaning, and no
 * number of time either. HOLLOW_CAPABILITY (90 for 9.0) and HOLLOW_SHARED, the bytes of shared memory of a thread
 * block, say which card it is. tests/hollow.py builds and names it.
 */
#include <driver_types.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define NOTHING(name) \
    int name(void) { return 0; }
#define HANDLE(name) \
    int name(void **handle) { *handle = calloc(1, 4096); return 0; }
#define OUT_OF_MEMORY 2
#define PAGE 4096

typedef unsigned long long address;

static double setting(const char *name) { return atof(getenv(name)); }

/* Memory: whole blocks (cudaMalloc), and segments that grow (cuMem...). */

static struct { void *start; size_t size; } blocks[1 << 16];
static size_t num_blocks, used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int take(size_t size) {
    pthread_mutex_lock(&lock);
    int fits = used + size <= (size_t)setting("HOLLOW_MEMORY");
    if (fits) used += size;
    pthread_mutex_unlock(&lock);
    return fits ? 0 : OUT_OF_MEMORY;
}
static void give_back(size_t size) {
    pthread_mutex_lock(&lock);
    used -= size;
    pthread_mutex_unlock(&lock);
}
static void *addresses(size_t size) {
    return mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

int cudaMalloc(void **start, size_t size) {
    size = (size + PAGE - 1) / PAGE * PAGE;
    if (take(size)) return OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    blocks[num_blocks].start = *start = addresses(size);
    blocks[num_blocks++].size = size;
    pthread_mutex_unlock(&lock);
    return 0;
}
int cudaFree(void *start) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; start && i < num_blocks; i++)
        if (blocks[i].start == start) {
            munmap(start, size = blocks[i].size);
            blocks[i] = blocks[--num_blocks];
            break;
        }
    pthread_mutex_unlock(&lock);
    give_back(size);
    return 0;
}
int cudaMemGetInfo(size_t *left, size_t *total) {
    *total = (size_t)setting("HOLLOW_MEMORY");
    *left = *total - used;
    return 0;
}
static int reserve(address *start, size_t size) { *start = (address)addresses(size); return 0; }
static int unreserve(address start, size_t size) { munmap((void *)start, size); return 0; }
static int create(address *handle, size_t size) { *handle = size; return take(size); }
static int release(address handle) { give_back(handle); return 0; }
static int granularity(size_t *size) { *size = 2 << 20; return 0; }
NOTHING(cudaMemset) NOTHING(cudaMemsetAsync) NOTHING(cudaMemcpy) NOTHING(cudaMemcpyAsync) NOTHING(cudaMemcpy2DAsync)
int cudaHostAlloc(void **start, size_t size) { *start = calloc(1, size); return 0; }
int cudaFreeHost(void *start) { free(start); return 0; }
NOTHING(cudaHostRegister) NOTHING(cudaHostUnregister)
int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeDevice;
    return 0;
}
int cuPointerGetAttribute(address *value, int attribute, address pointer) { *value = pointer; return 0; }

/* The device. */

static int attribute(int number) {
    int capability = (int)setting("HOLLOW_CAPABILITY");
    switch (number) {
        case cudaDevAttrComputeCapabilityMajor: return capability / 10;
        case cudaDevAttrComputeCapabilityMinor: return capability % 10;
        case cudaDevAttrMultiProcessorCount: return 132;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return (int)setting("HOLLOW_SHARED");
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        default: return 1024;
    }
}
int cudaDeviceGetAttribute(int *value, int number) { *value = attribute(number); return 0; }
int cuDeviceGetAttribute(int *value, int number) { *value = attribute(number); return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp *card) {
    memset(card, 0, sizeof *card);
    strcpy(card->name, "a hollow GPU");
    card->major = attribute(cudaDevAttrComputeCapabilityMajor);
    card->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    card->totalGlobalMem = (size_t)setting("HOLLOW_MEMORY");
    card->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    card->multiProcessorCount = 132;
    card->sharedMemPerBlock = 49152;
    card->warpSize = 32;
    card->maxThreadsPerBlock = 1024;
    card->maxThreadsPerMultiProcessor = 2048;
    card->regsPerMultiprocessor = card->regsPerBlock = 65536;
    card->l2CacheSize = 60 << 20;
    for (int i = 0; i < 3; i++) card->maxGridSize[i] = 1 << 30, card->maxThreadsDim[i] = 1024;
    return 0;
}
static int version(int *number) { *number = 13000; return 0; }
int cudaDriverGetVersion(int *number) { return version(number); }
int cudaRuntimeGetVersion(int *number) { return version(number); }
int cuDriverGetVersion(int *number) { return version(number); }
static int first(int *device) { *device = 0; return 0; }
int cudaGetDevice(int *device) { return first(device); }
int cuDeviceGet(int *device) { return first(device); }
static int one(int *count) { *count = 1; return 0; }
int cudaGetDeviceCount(int *count) { return one(count); }
int cuDeviceGetCount(int *count) { return one(count); }
static int is_active(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return is_active(device, flags, active); }
static int describe(int error, const char **text) { *text = error == OUT_OF_MEMORY ? "out of memory" : "?"; return 0; }
int cuGetErrorString(int error, const char **text) { return describe(error, text); }
HANDLE(cuCtxGetCurrent) HANDLE(cuDevicePrimaryCtxRetain)
NOTHING(cuInit) NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cudaSetDevice)
NOTHING(cudaDeviceSynchronize) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError)
NOTHING(cudaThreadExchangeStreamCaptureMode)

/* Streams, events and kernels. */

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = cudaStreamCaptureStatusNone; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { return cudaStreamIsCapturing(stream, status); }
HANDLE(cudaStreamCreate) HANDLE(cudaStreamCreateWithPriority) HANDLE(cudaStreamCreateWithFlags)
HANDLE(cudaEventCreate) HANDLE(cudaEventCreateWithFlags)
NOTHING(cudaStreamDestroy) NOTHING(cudaStreamSynchronize) NOTHING(cudaStreamQuery) NOTHING(cudaStreamWaitEvent)
NOTHING(cudaEventDestroy) NOTHING(cudaEventQuery) NOTHING(cudaEventRecord) NOTHING(cudaEventRecordWithFlags)
NOTHING(cudaEventSynchronize)
int cudaEventElapsedTime(float *milliseconds) { *milliseconds = 1; return 0; }
NOTHING(cudaLaunchKernel) NOTHING(cudaLaunchKernelExC) NOTHING(cudaFuncSetAttribute)
int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    int capability = (int)setting("HOLLOW_CAPABILITY");
    attributes->binaryVersion = attributes->ptxVersion = capability == 89 ? 86 : capability; /* PyTorch is built for */
    return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_of_kernel) { return one(blocks_of_kernel); }
HANDLE(cudaLibraryLoadData) HANDLE(cudaLibraryGetKernel)
NOTHING(cudaLibraryUnload) NOTHING(cudaKernelSetAttributeForDevice)
HANDLE(cuModuleLoad) HANDLE(cuModuleLoadData) HANDLE(cuModuleLoadDataEx) HANDLE(cuModuleGetFunction)
NOTHING(cuModuleUnload) NOTHING(cuLaunchKernel) NOTHING(cuLaunchKernelEx) NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig) NOTHING(cuTensorMapEncodeTiled)
int cuFuncGetAttribute(int *value, int number) { *value = number ? 0 : 1024; return 0; } /* 0: threads of a block */
int cuOccupancyMaxActiveClusters(int *clusters) { return one(clusters); }

/* Entry points of the driver that PyTorch asks for by name; those that are not listed do nothing. */

static int nothing(void) { return 0; }
static const struct { const char *name; void *function; } entries[] = {
    {"cuMemAddressReserve", reserve}, {"cuMemAddressFree", unreserve}, {"cuMemCreate", create},
    {"cuMemRelease", release}, {"cuMemGetAllocationGranularity", granularity}, {"cuGetErrorString", describe},
    {"cuDevicePrimaryCtxGetState", is_active}, {"cuDeviceGetAttribute", cuDeviceGetAttribute}, {"cuCtxGetDevice", first},
};
int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, address flags, int *found) {
    *function = nothing;
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (!strcmp(name, entries[i].name)) *function = entries[i].function;
    if (found) *found = cudaDriverEntryPointSuccess;
    return 0;
}

/* NVML, which PyTorch 2.13 asks whether memory can be shared between nodes. */

NOTHING(nvmlInit) NOTHING(nvmlInit_v2) NOTHING(nvmlDeviceGetNvLinkRemoteDeviceType)
NOTHING(nvmlDeviceGetNvLinkRemotePciInfo_v2) NOTHING(nvmlDeviceGetComputeRunningProcesses)
NOTHING(nvmlSystemGetCudaDriverVersion_v2)
int nvmlDeviceGetCount_v2(int *count) { return one(count); }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) { *handle = 0; return 0; }
int nvmlDeviceGetGpuFabricInfoV(void) { return 3; } /* not supported */

/* cuBLAS. */

HANDLE(cublasCreate_v2) HANDLE(cublasLtMatmulDescCreate) HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
NOTHING(cublasDestroy_v2) NOTHING(cublasSetStream_v2) NOTHING(cublasSetWorkspace_v2) NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2) NOTHING(cublasGemmEx) NOTHING(cublasSgemmEx) NOTHING(cublasSgemm_v2)
NOTHING(cublasDgemm_v2) NOTHING(cublasSgemv_v2) NOTHING(cublasGemmStridedBatchedEx) NOTHING(cublasSgemmStridedBatched)
NOTHING(cublasLtMatmul) NOTHING(cublasLtMatmulDescDestroy) NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy) NOTHING(cublasLtMatrixLayoutSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy) NOTHING(cublasLtMatmulPreferenceSetAttribute)
static int none(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetMathMode(void *handle, int *mode) { return none(handle, mode); }
int cublasGetPointerMode_v2(void *handle, int *mode) { return none(handle, mode); }
int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f, void *g, int most, void *results,
                                   int *found) {
    return one(found);
}
