// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 as storage types. All arithmetic is in float. Rounds to nearest, ties to even; NaN stays NaN.
// Written with selects instead of branches, so that loops over the conversions vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/host_device.h"

namespace torchopt {

struct Float16 {
    std::uint16_t bits;
};
struct BFloat16 {
    std::uint16_t bits;
};

TORCHOPT_HOST_DEVICE std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return bits;
}
TORCHOPT_HOST_DEVICE float from_bits(std::uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

TORCHOPT_HOST_DEVICE float load(float x) { return x; }
TORCHOPT_HOST_DEVICE double load(double x) { return x; }
TORCHOPT_HOST_DEVICE float load(BFloat16 x) {
    return from_bits(static_cast<std::uint32_t>(x.bits) << 16);
}
/// Moves exponent and fraction to their positions in a float, then corrects the bias with a multiplication, which also
/// normalises subnormal numbers.
TORCHOPT_HOST_DEVICE float load(Float16 x) {
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
    const std::uint32_t finite = bits_of(from_bits(magnitude) * 0x1p112f);
    const std::uint32_t special = magnitude | 0x7f800000u;
    return from_bits(sign | (magnitude >= (0x7c00u << 13) ? special : finite));
}

TORCHOPT_HOST_DEVICE void store(float x, float& out) { out = x; }
TORCHOPT_HOST_DEVICE void store(double x, double& out) { out = x; }
TORCHOPT_HOST_DEVICE void store(float x, BFloat16& out) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t nan = (bits >> 16) | 0x40u;
    out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
TORCHOPT_HOST_DEVICE void store(float x, Float16& out) {
    const std::uint32_t bits = bits_of(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t normal =
        ((magnitude + 0xfffu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
    // Below 2^-14 the spacing is 2^-24, which is also the spacing of floats from 0.5 on. So adding 0.5 rounds.
    const std::uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
    std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    out.bits = static_cast<std::uint16_t>(sign | half);
}

/// The type in which a storage type is computed.
template <class Storage>
struct ComputeType {
    using type = float;
};
template <>
struct ComputeType<double> {
    using type = double;
};
template <class Storage>
using Compute = typename ComputeType<Storage>::type;

}  // namespace torchopt
