// CPU kernels of one instruction set, and the set in use: the best of this processor and build.
#pragma once

#include "consistency_cpu.h"
#include "evidential_cpu.h"
#include "shift.h"

namespace mics {

struct InstructionSet {
    const char* name;
    bool available;
    const EvidentialKernels* evidential;
    const ConsistencyKernels* consistency;
    const ShiftKernels* shift;
};

const InstructionSet& instruction_set();
// For tests: use the named instruction set from now on; false if it is not available.
bool use_instruction_set(const char* name);

}  // namespace mics
