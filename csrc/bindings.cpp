// The Python module `_sabmn_ext`: raw pointers in, a status out. The only file that knows pybind11.
//
// Pointers arrive as integers (tensor.data_ptr()), 0 for an absent tensor. Every call names its number of threads: torch's
// setting, since a fresh Python thread does not inherit OpenMP's. The GIL is released while a kernel runs.

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/device.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "spectral_norm/spectral_norm.h"

namespace py = pybind11;

namespace sabmn {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// ---- instruction set ----

enum class Isa { baseline, avx2, avx512 };

Isa detect_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512) return Isa::avx512;
    if (avx2) return Isa::avx2;
#endif
    return Isa::baseline;
}

const Isa detected_isa = detect_isa();
Isa chosen_isa = detected_isa;
const char* const isa_names[] = {"baseline", "avx2", "avx512"};

void set_isa(const std::string& name) {
    for (int isa = 0; isa <= static_cast<int>(detected_isa); ++isa) {
        if (name == isa_names[isa]) {
            chosen_isa = static_cast<Isa>(isa);
            return;
        }
    }
    throw py::value_error("instruction set '" + name + "' is not available here; the widest is '" +
                          isa_names[static_cast<int>(detected_isa)] + "'");
}

// for_isa(SABMN_VARIANTS(function)) is the variant of `function` for the chosen instruction set.
#if defined(__x86_64__)
#define SABMN_VARIANTS(function) {baseline::function, avx2::function, avx512::function}
#else
#define SABMN_VARIANTS(function) {baseline::function, baseline::function, baseline::function}
#endif

template <typename Function>
Function* for_isa(Function* const (&variants)[3]) {
    return variants[static_cast<int>(chosen_isa)];
}

// ---- threads ----

// A forked child (a data-loader worker) has none of its parent's OpenMP threads, and waiting for them hangs.
bool forked = false;

int usable_threads(int threads) { return forked ? 1 : threads; }

// ---- spectral normalisation ----

using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<std::int64_t>;

int spectral_norm_forward(const Addresses& weights, const Addresses& u, const Addresses& v, const Addresses& normalized,
                          const Addresses& u_new, const Addresses& v_new, const Sizes& rows, const Sizes& columns,
                          std::uintptr_t sigma, int iterations, double eps, int dtype, int threads) {
    std::vector<SpectralNormForwardMatrix> matrices;
    matrices.reserve(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        matrices.push_back({pointer<const void>(weights[i]), pointer<const void>(u[i]), pointer<const void>(v[i]),
                            pointer<void>(normalized[i]), pointer<void>(u_new[i]), pointer<void>(v_new[i]), rows[i],
                            columns[i]});
    }
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(spectral_norm_forward))(matrices.data(), static_cast<std::int64_t>(matrices.size()),
                                                          pointer<void>(sigma), iterations, eps,
                                                          static_cast<DType>(dtype), usable_threads(threads));
}

int spectral_norm_backward(const Addresses& gradients, const Addresses& weights, const Addresses& u, const Addresses& v,
                           const Addresses& weight_gradients, const Sizes& rows, const Sizes& columns,
                           std::uintptr_t sigma, int dtype, int threads) {
    std::vector<SpectralNormBackwardMatrix> matrices;
    matrices.reserve(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
        matrices.push_back({pointer<const void>(gradients[i]), pointer<const void>(weights[i]), pointer<const void>(u[i]),
                            pointer<const void>(v[i]), pointer<void>(weight_gradients[i]), rows[i], columns[i]});
    }
    py::gil_scoped_release release;
    return for_isa(SABMN_VARIANTS(spectral_norm_backward))(matrices.data(), static_cast<std::int64_t>(matrices.size()),
                                                           pointer<const void>(sigma), static_cast<DType>(dtype),
                                                           usable_threads(threads));
}

// ---- what was compiled ----

py::dict build_info() {
    py::dict info;
    info["compiler"] = __VERSION__;
    info["isas"] = py::make_tuple(
#ifdef SABMN_BASELINE
        "baseline"
#endif
#ifdef SABMN_AVX2
        , "avx2"
#endif
#ifdef SABMN_AVX512
        , "avx512"
#endif
    );
#ifdef SABMN_CUDA_TARGETS
    info["cuda_targets"] = py::str(SABMN_CUDA_TARGETS).attr("split")();
    info["cuda_missing"] = py::none();
#else
    info["cuda_targets"] = py::list();
    info["cuda_missing"] = SABMN_CUDA_MISSING;
#endif
    return info;
}

#ifdef SABMN_CUDA_TARGETS
py::dict cuda_info() {
    const CudaReport report = cuda_report();
    py::list devices;
    for (const DeviceReport& device : report.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["problem"] = device.problem;
        devices.append(entry);
    }
    py::dict info;
    info["runtime_version"] = report.runtime_version;
    info["driver_version"] = report.driver_version;
    info["problem"] = report.problem;
    info["devices"] = devices;
    return info;
}
#endif

}  // namespace
}  // namespace sabmn

PYBIND11_MODULE(_sabmn_ext, m) {
    using namespace sabmn;
    pthread_atfork(nullptr, nullptr, [] { forked = true; });

    m.attr("FINGERPRINT") = SABMN_FINGERPRINT;
    m.def("build_info", build_info);
#ifdef SABMN_CUDA_TARGETS
    m.def("cuda_info", cuda_info);
#endif
    m.def("spectral_norm_forward", spectral_norm_forward);
    m.def("spectral_norm_backward", spectral_norm_backward);
    m.def("isa", [] { return isa_names[static_cast<int>(chosen_isa)]; });
    m.def("set_isa", set_isa, "Use one of build_info()['isas'] from now on; for tests and for comparing.");
    if (const char* asked = std::getenv("SABMN_ISA")) set_isa(asked);
}
