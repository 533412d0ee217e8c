// One source, several instruction sets. setup.py compiles every *_cpu.cpp once for each set, with SABMN_ISA naming it;
// the code stands in namespace sabmn::SABMN_ISA, and bindings.cpp picks the widest set that the processor has and that
// pays there.
//
// A *_cpu.cpp keeps its helpers in an anonymous namespace and uses no inline function of the standard library in its
// loops: the linker merges those across the sets, and could keep the one an older processor cannot run.
#pragma once

#if defined(__x86_64__)
#define SABMN_FOR_EACH_ISA(declaration) \
    namespace baseline { declaration }  \
    namespace avx2 { declaration }      \
    namespace avx512 { declaration }
// Self-attention multiplies bfloat16 in pairs with AVX512-BF16. All else runs there as for avx512, and is not compiled
// again (setup.py).
#define SABMN_FOR_BF16_ISA(declaration) \
    namespace avx512_bf16 { declaration }
#else
#define SABMN_FOR_EACH_ISA(declaration) \
    namespace baseline { declaration }
#define SABMN_FOR_BF16_ISA(declaration)
#endif
