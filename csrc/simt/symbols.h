// The names in this program's own symbol table: of a kernel by its address, and the static __shared__ variables.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace simt {

// "attention_forward_kernel<float, 64>": without return type, namespaces of the code and parameters.
std::string kernel_name(const void* kernel);

struct StaticShared {
    char* memory;
    std::size_t bytes;
};

// Every variable that a kernel declared __shared__.
const std::vector<StaticShared>& static_shared();

}  // namespace simt
