// The kernel of the library `_data` for one instruction set; see isa_build.cpp.
#include "mixup_kernel.h"
