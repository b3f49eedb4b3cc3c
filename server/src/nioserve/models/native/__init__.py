"""The decoder's step for INT8 on x86 processors with AVX-512, in C++ (its source is server/native)."""
