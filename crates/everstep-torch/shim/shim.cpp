// All of it in one: libtorch's headers take most of the compiler's time.

#include "fp8.cpp"
#include "head.cpp"
#include "recompute.cpp"
