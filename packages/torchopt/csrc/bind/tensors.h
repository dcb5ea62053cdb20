// SPDX-License-Identifier: Apache-2.0
// What is known of torch's tensors here. libtorch is not linked, so that one binary serves every version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "launch/tensors.h"

namespace torchopt {

namespace py = pybind11;

/// The device of tensors that the CPU kernels serve.
inline constexpr int kCpu = -1;

/// Tells which classes have their elements in plain memory, and which objects are the dtypes of `Dtype`, in its order.
/// `exchange` is torch.Tensor's capsule of DLPack's C interface, None for a torch without it: tensors are then asked
/// through their Python methods, slower, and none are made here. To be called once, before anything else.
void learn_tensors(py::tuple classes, py::tuple dtypes, py::object exchange);

/// Whether `make_tensor` can be called.
bool can_make_tensors();

/// The address of a tensor's first element; throws what torch raised.
std::uintptr_t address_of(PyObject* tensor);

/// The number of elements; throws what torch raised.
std::int64_t size_of(PyObject* tensor);

/// A tensor that the kernels can serve: of a plain class, contiguous, without pending negation, with its own memory.
struct Dense {
    std::uintptr_t address;
    std::int64_t size;
    Dtype dtype;
    int device;  // the index, kCpu for the CPU
    std::int32_t ndim;
    const std::int64_t* shape;  // until the tensor changes

    bool has_shape_of(const Dense& other) const;
};

/// Reads tensors one after the other. Not shared between threads.
class Reader {
  public:
    /// The tensor, or nothing if the kernels cannot serve it. The shape is that of the reader until the
    /// next call where torch has no C interface. Throws nothing that torch raised.
    std::optional<Dense> read(PyObject* tensor);

    /// The same for an object that has been read before, whose class and pending negation are known.
    std::optional<Dense> read_again(PyObject* tensor);

  private:
    std::optional<Dense> ask(PyObject* tensor);
    std::vector<std::int64_t> shape_;
};

/// Bytes [begin, end).
struct Span {
    std::uintptr_t begin, end;
};
Span span_of(const Dense& x);

/// Sorts `spans`; whether no two of them share a byte.
bool sort_disjoint(std::vector<Span>& spans);

/// Whether no two of these tensors share memory; false where one of them cannot be read.
bool are_disjoint(const py::list& tensors);

/// Whether a graph follows `tensor`.
bool requires_grad(PyObject* tensor);

/// A new contiguous tensor on the CPU, of the shape and dtype of `like`, with elements that are not set. Its memory comes
/// from `buffers.h`.
py::object make_tensor(const Dense& like, std::uintptr_t& address);

/// A new 0-dim int64 tensor that holds `value`.
py::object make_count(std::int64_t value);

/// The value of a 0-dim int64 tensor on the CPU; nothing for any other object.
std::optional<std::int64_t> count_of(PyObject* tensor);

}  // namespace torchopt
