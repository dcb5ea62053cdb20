// SPDX-License-Identifier: Apache-2.0
// Postpones garbage collection while many objects are created in a row.
#pragma once

#include "cpython/compat.h"

namespace optree {

// A collection in the middle of a tree would only visit new objects that are not in a cycle yet. It
// starts instead with the next object that the program creates, if enough objects are alive by
// then. A tree that replaces a freed one does not trigger a collection. Makes unflatten up to twice
// as fast on large trees with the collector on (benchmarks/optree).
//
// Python code must find the collector in the state in which the program left it. Without the
// interpreter lock other threads could see the difference, so nothing is postponed there.
class CollectorPause {
  public:
#if PY_VERSION_HEX >= 0x030A0000 && !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED)
    static bool has_effect() noexcept { return PyGC_IsEnabled() != 0; }
    // Starts a collection that is already due. Without this a program that creates nothing but
    // large trees would postpone it forever. CPython does not reuse a freed cell object, so the
    // next one always counts as an allocation.
    static void let_start() noexcept {
        PyObject* cell = PyCell_New(nullptr);
        if (cell == nullptr) PyErr_Clear();
        Py_XDECREF(cell);
    }
    OPTREE_INLINE void begin() noexcept {
        if (!begun_) begun_ = PyGC_Disable() != 0;
    }
    OPTREE_INLINE void end() noexcept {
        if (!begun_) return;
        begun_ = false;
        PyGC_Enable();
    }

  private:
    bool begun_ = false;
#else
    static bool has_effect() noexcept { return false; }
    static void let_start() noexcept {}
    void begin() noexcept {}
    void end() noexcept {}
#endif
};

}  // namespace optree
