// SPDX-License-Identifier: Apache-2.0
// Documented features that differ in spelling between Python versions and compilers.
#pragma once

#ifndef PY_SSIZE_T_CLEAN
#define PY_SSIZE_T_CLEAN
#endif
#include <Python.h>
#include <structmember.h>

#include <cstddef>
#include <cstdint>

#if PY_VERSION_HEX < 0x03090000
#error "optree needs Python 3.9 or newer"
#endif

#if defined(__GNUC__) || defined(__clang__)
#define OPTREE_LIKELY(x) __builtin_expect(!!(x), 1)
#define OPTREE_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define OPTREE_COLD __attribute__((cold, noinline))
#define OPTREE_INLINE inline __attribute__((always_inline))
#define OPTREE_INLINE_LAMBDA __attribute__((always_inline))  // placed after the parameters
#define OPTREE_NOINLINE __attribute__((noinline))
#else
#define OPTREE_LIKELY(x) (x)
#define OPTREE_UNLIKELY(x) (x)
#define OPTREE_COLD
#define OPTREE_INLINE inline
#define OPTREE_INLINE_LAMBDA
#define OPTREE_NOINLINE
#endif

namespace optree::compat {

// Prefetches a cache line; any address is allowed.
OPTREE_INLINE void prefetch([[maybe_unused]] const void* address) noexcept {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(address);
#endif
}

// Whether threads run Python code at the same time (support/sharing.h).
#if defined(Py_GIL_DISABLED)
inline constexpr bool kFreeThreaded = true;
#else
inline constexpr bool kFreeThreaded = false;
#endif

// Whether the collector runs inside allocations, together with callbacks and finalizers. Later
// versions wait until the interpreter runs Python code.
inline constexpr bool kCollectsInAllocations = PY_VERSION_HEX < 0x030C0000;

// Whether exceptions support notes.
inline constexpr bool kHasNotes = PY_VERSION_HEX >= 0x030B0000;

#if defined(PYPY_VERSION)
inline constexpr bool kPyPy = true;
inline constexpr const char* kPyPyVersion = PYPY_VERSION;
inline constexpr int kPyPyVersionNumber = PYPY_VERSION_NUM;
#else
inline constexpr bool kPyPy = false;
inline constexpr const char* kPyPyVersion = "";
inline constexpr int kPyPyVersionNumber = 0;
#endif
#if defined(Py_DEBUG)
inline constexpr bool kDebug = true;
#else
inline constexpr bool kDebug = false;
#endif

inline PyObject* new_ref(PyObject* object) noexcept {
    Py_INCREF(object);
    return object;
}

inline PyObject* xnew_ref(PyObject* object) noexcept {
    Py_XINCREF(object);
    return object;
}

// The item of a list as a new reference. Null with IndexError set if the list is too short by now.
inline PyObject* list_item(PyObject* list, Py_ssize_t index) noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return PyList_GetItemRef(list, index);
#else
    return xnew_ref(PyList_GetItem(list, index));
#endif
}

// The value of a key of a dict as a new reference; null if the key is missing or on error.
// Runs Python code; call `item_of` (support/ref.h) instead.
inline PyObject* dict_item(PyObject* dict, PyObject* key) {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* value = nullptr;
    PyDict_GetItemRef(dict, key, &value);
    return value;
#else
    return xnew_ref(PyDict_GetItemWithError(dict, key));
#endif
}

// The maximum depth of a tree. It is smaller where C frames are large or the stack is small.
#if defined(PYPY_VERSION) || defined(Py_DEBUG) || defined(_WIN32) || defined(__wasm__)
#if defined(_WIN32) && (defined(Py_DEBUG) || defined(Py_GIL_DISABLED))
#if PY_VERSION_HEX < 0x030A0000
inline constexpr int kMaxDepth = 100;
#else
inline constexpr int kMaxDepth = 250;
#endif
#else
inline constexpr int kMaxDepth = 500;
#endif
#else
inline constexpr int kMaxDepth = 1000;
#endif

// The free bytes of C stack that Python code needs when it is called. CPython 3.14 raises
// RecursionError when fewer than 48 KiB are left and aborts the process below 16 KiB.
inline constexpr std::size_t kStackOfPython = (PY_VERSION_HEX >= 0x030E0000 ? 56 : 16) * 1024;

// Module slots that declare support for subinterpreters and free threading, where Python has such
// slots.
#if defined(Py_mod_multiple_interpreters)
#define OPTREE_MODULE_PER_INTERPRETER \
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#else
#define OPTREE_MODULE_PER_INTERPRETER
#endif
#if defined(Py_mod_gil)
#define OPTREE_MODULE_WITHOUT_GIL {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#else
#define OPTREE_MODULE_WITHOUT_GIL
#endif

}  // namespace optree::compat
