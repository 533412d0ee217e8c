// One source, several instruction sets. setup.py compiles every *_cpu.cpp once for each set, with SABMN_ISA naming it;
// the code stands in namespace sabmn::SABMN_ISA, and bindings.cpp picks the widest set that the processor has.
//
// A *_cpu.cpp keeps its helpers in an anonymous namespace and uses no inline function of the standard library in its
// loops: the linker merges those across the sets, and could keep the one an older processor cannot run.
#pragma once

#if defined(__x86_64__)
#define SABMN_FOR_EACH_ISA(declaration) \
    namespace baseline { declaration }  \
    namespace avx2 { declaration }      \
    namespace avx512 { declaration }
#else
#define SABMN_FOR_EACH_ISA(declaration) \
    namespace baseline { declaration }
#endif
