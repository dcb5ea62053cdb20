// SPDX-License-Identifier: Apache-2.0
// Every difference between Python versions and compilers that the library cares about.
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
#define OPTREE_NOINLINE __attribute__((noinline))
#else
#define OPTREE_LIKELY(x) (x)
#define OPTREE_UNLIKELY(x) (x)
#define OPTREE_COLD
#define OPTREE_INLINE inline
#define OPTREE_NOINLINE
#endif

namespace optree::compat {

// Asks for a cache line; any address will do.
OPTREE_INLINE void prefetch([[maybe_unused]] const void* address) noexcept {
#if defined(__GNUC__) || defined(__clang__)
    __builtin_prefetch(address);
#endif
}

#if PY_VERSION_HEX >= 0x030A0000
inline constexpr unsigned long kImmutableType = Py_TPFLAGS_IMMUTABLETYPE;
inline constexpr unsigned long kNoInstantiation = Py_TPFLAGS_DISALLOW_INSTANTIATION;
#else
inline constexpr unsigned long kImmutableType = 0;
inline constexpr unsigned long kNoInstantiation = 0;
#endif

// Whether threads run Python code at the same time (support/sharing.h).
#if defined(Py_GIL_DISABLED)
inline constexpr bool kFreeThreaded = true;
#else
inline constexpr bool kFreeThreaded = false;
#endif

inline PyObject* new_ref(PyObject* object) noexcept {
    Py_INCREF(object);
    return object;
}

inline PyObject* xnew_ref(PyObject* object) noexcept {
    Py_XINCREF(object);
    return object;
}

// A dict with room for `size` items. Where CPython no longer exports the presizing call the dict
// grows as it is filled.
inline PyObject* new_dict(Py_ssize_t size) noexcept {
#if PY_VERSION_HEX < 0x030D0000 && !defined(PYPY_VERSION)
    return size > 5 ? _PyDict_NewPresized(size) : PyDict_New();
#else
    (void)size;
    return PyDict_New();
#endif
}

// Whether a list keeps its items in a plain block of PyMem_Malloc that it can be given. Saves the
// zeroing of a block that is overwritten at once and, for a large one, its copy.
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030F0000
inline constexpr bool kListTakesItems = true;
#else
inline constexpr bool kListTakesItems = false;
#endif

// Gives an empty list that nobody has seen its items.
inline void give_items([[maybe_unused]] PyObject* list, [[maybe_unused]] PyObject** items,
                       [[maybe_unused]] Py_ssize_t count) noexcept {
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED)
    auto* made = reinterpret_cast<PyListObject*>(list);
    made->ob_item = items;
    made->allocated = count;
    Py_SET_SIZE(made, count);
#endif
}

// The item of a list as a new reference; null with IndexError set if there is none (any more).
inline PyObject* list_item(PyObject* list, Py_ssize_t index) noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    return PyList_GetItemRef(list, index);
#else
    return xnew_ref(PyList_GetItem(list, index));
#endif
}

// The value under a key of a dict as a new reference; null if there is none, or on error.
inline PyObject* dict_item(PyObject* dict, PyObject* key) noexcept {
#if PY_VERSION_HEX >= 0x030D0000
    PyObject* value = nullptr;
    PyDict_GetItemRef(dict, key, &value);
    return value;
#else
    return xnew_ref(PyDict_GetItemWithError(dict, key));
#endif
}

// The type's version tag: changes whenever the type or a base is modified; 0 means unknown.
inline unsigned int type_version(PyTypeObject* type) noexcept {
#if defined(PYPY_VERSION)
    (void)type;
    return 0;
#else
#if defined(Py_GIL_DISABLED)
    const unsigned int tag = _Py_atomic_load_uint_relaxed(&type->tp_version_tag);
    if (tag != 0) return tag;
    PyUnstable_Type_AssignVersionTag(type);
    return _Py_atomic_load_uint_relaxed(&type->tp_version_tag);
#elif PY_VERSION_HEX >= 0x030C0000
    if (type->tp_version_tag == 0) PyUnstable_Type_AssignVersionTag(type);
    return type->tp_version_tag;
#else
    return PyType_HasFeature(type, Py_TPFLAGS_VALID_VERSION_TAG) ? type->tp_version_tag : 0;
#endif
#endif
}

#define OPTREE_VISIT_TYPE(self) Py_VISIT(Py_TYPE(self))

// Max depth of a tree: half of it where C frames are large or the stack is small.
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

}  // namespace optree::compat
