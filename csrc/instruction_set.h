// The CPU kernels of one instruction set, and the set that runs: the best one that this processor and
// this build have.
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
// For tests: use the named instruction set from now on; false where it is not to be had.
bool use_instruction_set(const char* name);

}  // namespace mics
