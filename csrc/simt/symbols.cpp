// Reads the ELF symbol table of the running program. Static __shared__ variables carry the ABI tag that the macro
// __shared__ of simt/builtins.h gives them.

#include "simt/symbols.h"

#include <cxxabi.h>
#include <elf.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace simt {
namespace {

std::string demangle(const char* mangled) {
    char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
    const std::string name = text ? text : mangled;
    std::free(text);
    return name;
}

// Calls visit(symbol, mangled name, address) for every symbol of the program.
template <typename Visit>
void for_each_symbol(Visit visit) {
    static const std::string file = [] {
        std::ifstream stream("/proc/self/exe", std::ios::binary);
        return std::string(std::istreambuf_iterator<char>(stream), {});
    }();
    ElfW(Addr) base = 0;  // where the program was loaded: the first entry is the program itself
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* result) {
            *static_cast<ElfW(Addr)*>(result) = info->dlpi_addr;
            return 1;
        },
        &base);
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(file.data());
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(file.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
        if (sections[i].sh_type != SHT_SYMTAB) continue;
        const char* names = file.data() + sections[sections[i].sh_link].sh_offset;
        const auto* symbol = reinterpret_cast<const ElfW(Sym)*>(file.data() + sections[i].sh_offset);
        for (const auto* end = symbol + sections[i].sh_size / sizeof *symbol; symbol < end; ++symbol) {
            visit(*symbol, names + symbol->st_name, reinterpret_cast<char*>(base + symbol->st_value));
        }
    }
}

}  // namespace

std::string kernel_name(const void* kernel) {
    std::string name = "unknown kernel";
    for_each_symbol([&](const ElfW(Sym)& symbol, const char* mangled, const void* address) {
        if (address == kernel && (symbol.st_info & 0xf) == STT_FUNC) name = demangle(mangled);
    });
    for (const std::string word : {"(anonymous namespace)::", "sabmn::", "void "}) {
        for (std::size_t at; (at = name.find(word)) != std::string::npos;) name.erase(at, word.size());
    }
    int depth = 0;
    for (std::size_t i = name.size(); i-- > 0;) {  // the parameters: from the last ')' back to its '('
        depth += (name[i] == ')') - (name[i] == '(');
        if (name[i] == '(' && depth == 0) return name.substr(0, i);
    }
    return name;
}

const std::vector<StaticShared>& static_shared() {
    static const std::vector<StaticShared> found = [] {
        std::vector<StaticShared> variables;
        for_each_symbol([&](const ElfW(Sym)& symbol, const char* mangled, char* address) {
            if ((symbol.st_info & 0xf) != STT_OBJECT || !std::strstr(mangled, "B11simt_shared")) return;
            if (symbol.st_info >> 4 != STB_LOCAL) {
                throw std::runtime_error("AddressSanitizer cannot guard " + demangle(mangled) +
                                         ": kernels with static __shared__ variables belong into an unnamed namespace");
            }
            variables.push_back({address, symbol.st_size});
        });
        return variables;
    }();
    return found;
}

}  // namespace simt
