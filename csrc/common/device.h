// What the CUDA part of this binary finds on this machine; for `python -m sabmn_ext.info`.
#pragma once

#include <string>
#include <vector>

namespace sabmn {

struct DeviceReport {
    std::string name;
    int major = 0, minor = 0;
    std::string problem;  // empty where the kernels of this binary run on the device, else CUDA's own words
};

struct CudaReport {
    int runtime_version = 0;  // 13000 is 13.0
    int driver_version = 0;   // 0: no driver
    std::string problem;      // why there is no device
    std::vector<DeviceReport> devices;
};

CudaReport cuda_report();

// CUDA's own words for a status of cuda_error (common/dtype.h) or more.
std::string cuda_error_text(int status);

}  // namespace sabmn
