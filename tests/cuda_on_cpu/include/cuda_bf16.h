// Stand-in for CUDA's header: the storage type and its conversions, rounding to nearest even.
#pragma once
struct __nv_bfloat16 {
    unsigned short bits;
};

CPU_UNCHECKED inline float __bfloat162float(__nv_bfloat16 b) {
    const unsigned bits = (unsigned)b.bits << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
CPU_UNCHECKED inline __nv_bfloat16 __double2bfloat16(double v) {
    // By way of float, rounded to odd: a set last bit says that something was cut off, so that
    // the second rounding sees what the first has dropped.
    float cut = (float)v;
    unsigned bits;
    memcpy(&bits, &cut, 4);
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    if (v != v) return {(unsigned short)((bits >> 16) | 0x40)};
    if (finite && (double)cut != v) {
        if ((fabs((double)cut) > fabs(v))) bits -= 1;  // towards zero, then odd
        bits |= 1;
    }
    if (finite) bits += 0x7fffu + ((bits >> 16) & 1u);
    return {(unsigned short)(bits >> 16)};
}
