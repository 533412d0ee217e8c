// The report names the one device that there is here, and its kernel runs.

#include "common/device.h"
#include "simt/test.h"

namespace sabmn {
__global__ void device_probe_kernel();
}

SIMT_TEST(device) {
    const sabmn::CudaReport report = sabmn::cuda_report();
    simt::expect(report.problem.empty() && report.devices.size() == 1, "expected one device: " + report.problem);
    simt::expect(report.devices[0].problem.empty() && report.devices[0].major == 8, report.devices[0].problem);
    simt::succeeds(sabmn::launch(sabmn::device_probe_kernel, 2, 3, 0, nullptr));
}
