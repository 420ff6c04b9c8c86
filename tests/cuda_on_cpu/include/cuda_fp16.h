// Stand-in for CUDA's header: the storage type and its conversions, rounding to nearest even.
#pragma once
struct __half {
    unsigned short bits;
};

CPU_UNCHECKED inline float __half2float(__half h) {
    _Float16 value;
    memcpy(&value, &h, 2);
    return (float)value;
}
CPU_UNCHECKED inline __half __double2half(double v) {
    const _Float16 value = (_Float16)v;
    __half h;
    memcpy(&h, &value, 2);
    return h;
}
