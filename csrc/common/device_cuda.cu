// Asks the CUDA runtime which devices there are, and whether this binary holds code that each of them can run.

#include "common/cuda.h"
#include "common/device.h"
#include "common/dtype.h"

namespace sabmn {

// Launched by its test alone: its attributes can be read only where the binary holds code for the device.
__global__ void device_probe_kernel() {}

CudaReport cuda_report() {
    CudaReport report;
    cudaRuntimeGetVersion(&report.runtime_version);
    cudaDriverGetVersion(&report.driver_version);
    int count = 0;
    const cudaError_t counted = cudaGetDeviceCount(&count);
    if (counted != cudaSuccess) {
        report.problem = cudaGetErrorString(counted);
        cudaGetLastError();  // leave no error behind for torch to find
        return report;
    }
    int current = 0;
    cudaGetDevice(&current);
    for (int device = 0; device < count; ++device) {
        DeviceReport entry;
        cudaDeviceProp properties;
        cudaError_t status = cudaGetDeviceProperties(&properties, device);
        if (status == cudaSuccess) {
            entry.name = properties.name;
            entry.major = properties.major;
            entry.minor = properties.minor;
            cudaFuncAttributes attributes;
            status = cudaSetDevice(device);
            if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, device_probe_kernel);
        }
        if (status != cudaSuccess) entry.problem = cudaGetErrorString(status);
        cudaGetLastError();
        report.devices.push_back(entry);
    }
    cudaSetDevice(current);
    return report;
}

std::string cuda_error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status - cuda_error)); }

}  // namespace sabmn
