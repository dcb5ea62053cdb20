// SPDX-License-Identifier: Apache-2.0
// What this module knows about torch's tensors. It does not link libtorch, so one binary works with every version of
// torch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "launch/tensors.h"

namespace torchopt {

namespace py = pybind11;

/// The device number of tensors on the CPU.
inline constexpr int kCpu = -1;

/// Registers the classes whose tensors have their elements in plain memory, and the dtype objects in the order of
/// `Dtype`. `exchange` is torch.Tensor's capsule with DLPack's C interface, or None for a torch without it. Without it
/// tensors are read through their Python methods, which is slower, and no tensors are created here. Must be called once
/// before any other function.
void learn_tensors(py::tuple classes, py::tuple dtypes, py::object exchange);

/// Finds out by trial where torch keeps that a negation is pending. Returns false if that is not clear: then the methods
/// of tensors are asked. The lists hold tensors of many kinds without and with a pending negation.
bool learn_negation(const py::list& plain, const py::list& negated);

/// Whether `make_tensor` can be called.
bool can_make_tensors();

/// The address of a tensor's first element. Throws if torch raises.
std::uintptr_t address_of(PyObject* tensor);

/// The number of elements. Throws if torch raises.
std::int64_t size_of(PyObject* tensor);

/// A tensor that the kernels accept: of a plain class, contiguous, without a pending negation, with memory of its own.
struct Dense {
    std::uintptr_t address;
    std::int64_t size;
    Dtype dtype;
    int device;  // the index, or kCpu
    std::int32_t ndim;
    const std::int64_t* shape;  // valid until the tensor changes

    bool has_shape_of(const Dense& other) const;
};

/// Reads one tensor after the other. A reader must not be shared between threads.
class Reader {
  public:
    /// Reads a tensor. Returns nothing if the kernels do not accept it. Without torch's C interface the reader owns the
    /// shape, which is valid until its next call. Exceptions that torch raises do not propagate.
    std::optional<Dense> read(PyObject* tensor);

    /// The same for an object that was read before, whose class is known.
    std::optional<Dense> read_again(PyObject* tensor);

  private:
    std::optional<Dense> ask(PyObject* tensor);
    std::vector<std::int64_t> shape_;
};

/// The bytes [begin, end).
struct Span {
    std::uintptr_t begin, end;
};
Span span_of(const Dense& x);

/// Sorts `spans`. Returns whether no two of them share a byte.
bool sort_disjoint(std::vector<Span>& spans);

/// Whether no two of these tensors share memory. False if one of them cannot be read.
bool are_disjoint(const py::list& tensors);

/// Whether autograd records operations on `tensor`.
bool requires_grad(PyObject* tensor);

/// A new contiguous tensor on the CPU with the shape and dtype of `like` and uninitialised elements. Its memory comes
/// from `buffers.h`.
py::object make_tensor(const Dense& like, std::uintptr_t& address);

/// A new 0-dim int64 tensor that holds `value`.
py::object make_count(std::int64_t value);

/// The value of a 0-dim int64 tensor on the CPU; nothing for any other object.
std::optional<std::int64_t> count_of(PyObject* tensor);

}  // namespace torchopt
