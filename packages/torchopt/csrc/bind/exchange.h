// SPDX-License-Identifier: Apache-2.0
// The function table with which torch's tensors are read and created without calls through Python: the C exchange
// interface of DLPack 1.3 (https://dmlc.github.io/dlpack/latest/c_api.html). torch.Tensor has it as the attribute
// __dlpack_c_exchange_api__. Only the parts used here are declared; the layout is the published one.
#pragma once

#include <cstdint>

namespace torchopt::exchange {

inline constexpr std::int32_t kCpuDevice = 1;
inline constexpr std::int32_t kCudaDevice = 2;
inline constexpr std::uint8_t kIntegers = 0;
inline constexpr std::uint8_t kFloats = 2;
inline constexpr std::uint8_t kBFloats = 4;
inline constexpr const char* kCapsule = "dlpack_exchange_api";
inline constexpr std::uint32_t kMajorVersion = 1;

struct Version {
    std::uint32_t major, minor;
};

struct Device {
    std::int32_t type, index;
};

struct ElementType {
    std::uint8_t kind, bits;
    std::uint16_t lanes;
};

/// A tensor owned elsewhere. `shape` and `strides` (in elements) have `ndim` entries.
struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    ElementType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

/// A tensor that `deleter` releases.
struct ManagedTensor {
    Version version;
    void* owner;
    void (*deleter)(ManagedTensor*);
    std::uint64_t flags;
    Tensor tensor;
};

/// The functions return 0, or -1 with a Python exception set. None of them synchronises a stream.
struct Table {
    Version version;
    Table* previous;
    void* allocate;
    int (*export_managed)(void* object, ManagedTensor** out);
    int (*import_managed)(ManagedTensor* tensor, void** out);
    int (*view)(void* object, Tensor* out);  // may be null
    void* current_stream;
};

}  // namespace torchopt::exchange
