// SPDX-License-Identifier: Apache-2.0
// Ownership of Python objects. A `PyObject*` is always borrowed; a `Ref` owns one reference.
#pragma once

#include <utility>

#include "cpython/calling.h"
#include "cpython/compat.h"
#include "cpython/type_slots.h"
#include "support/stack.h"

namespace optree {

// Thrown when a Python exception is set. The boundary catches it and returns NULL.
struct PythonError {};

class Ref {
  public:
    Ref() noexcept = default;
    Ref(std::nullptr_t) noexcept {}
    Ref(const Ref&) = delete;
    Ref& operator=(const Ref&) = delete;
    Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Ref& operator=(Ref&& other) noexcept {
        PyObject* old = std::exchange(object_, std::exchange(other.object_, nullptr));
        Py_XDECREF(old);
        return *this;
    }
    ~Ref() { Py_XDECREF(object_); }

    // Takes over a reference; null stays null.
    static Ref steal(PyObject* object) noexcept { return Ref(object); }
    // Takes a new reference.
    static Ref borrow(PyObject* object) noexcept {
        Py_XINCREF(object);
        return Ref(object);
    }

    PyObject* get() const noexcept { return object_; }
    explicit operator bool() const noexcept { return object_ != nullptr; }
    // Hands the reference over to a call that steals it.
    [[nodiscard]] PyObject* release() noexcept { return std::exchange(object_, nullptr); }

  private:
    explicit Ref(PyObject* object) noexcept : object_(object) {}
    PyObject* object_ = nullptr;
};

// Owns the new reference that a C API call returned. Throws if the call raised.
inline Ref checked(PyObject* result) {
    if (OPTREE_UNLIKELY(result == nullptr)) throw PythonError{};
    return Ref::steal(result);
}

// Marks a class as one that only this library creates instances of, also where Python has no flag
// for it.
inline Ref internal_class(Ref cls) noexcept {
    compat::forbid_instances(reinterpret_cast<PyTypeObject*>(cls.get()));
    return cls;
}

inline void check_status(int status) {
    if (OPTREE_UNLIKELY(status < 0)) throw PythonError{};
}

inline bool check_truth(int truth) {
    if (OPTREE_UNLIKELY(truth < 0)) throw PythonError{};
    return truth != 0;
}

// Whether `a == b`: by identity first, then by rich comparison. May run Python code.
inline bool equal(PyObject* a, PyObject* b) {
    if (a == b) return true;
    check_stack();
    return check_truth(calling_python([&] { return PyObject_RichCompareBool(a, b, Py_EQ); }));
}

}  // namespace optree
