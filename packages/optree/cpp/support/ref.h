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
        xdrop(old);
        return *this;
    }
    ~Ref() { xdrop(object_); }

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

// The calls below may run Python code.

inline Ref attribute_of(PyObject* object, const char* name) {
    return checked(calling_python([&] { return PyObject_GetAttrString(object, name); }));
}
inline Ref attribute_of(PyObject* object, PyObject* name) {
    return checked(calling_python([&] { return PyObject_GetAttr(object, name); }));
}

// The value of a key of a dict; null if the key is missing.
inline Ref item_of(PyObject* dict, PyObject* key) {
    Ref value = Ref::steal(calling_python([&] { return compat::dict_item(dict, key); }));
    if (!value && PyErr_Occurred()) throw PythonError{};
    return value;
}
inline void set_item(PyObject* dict, PyObject* key, PyObject* value) {
    check_status(calling_python([&] { return PyDict_SetItem(dict, key, value); }));
}

inline Ref iterator_of(PyObject* iterable) {
    return checked(calling_python([&] { return PyObject_GetIter(iterable); }));
}
// The next item; null at the end.
inline Ref next_of(PyObject* iterator) {
    Ref item = Ref::steal(calling_python([&] { return PyIter_Next(iterator); }));
    if (!item && PyErr_Occurred()) throw PythonError{};
    return item;
}

inline bool truth_of(PyObject* object) {
    return check_truth(calling_python([&] { return PyObject_IsTrue(object); }));
}

// Whether `a == b`: by identity first, then by rich comparison.
inline bool equal(PyObject* a, PyObject* b) {
    if (a == b) return true;
    check_stack();
    return check_truth(calling_python([&] { return PyObject_RichCompareBool(a, b, Py_EQ); }));
}

}  // namespace optree
