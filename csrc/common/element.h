// The element types that CPU kernels take; float64 is left to the reference.
#pragma once

namespace bit_kernels {

enum class Element { kFloat32, kBFloat16, kFloat16 };

}  // namespace bit_kernels
