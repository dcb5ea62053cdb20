// SPDX-License-Identifier: Apache-2.0
// Postpones collections while many objects are made in a row.
#pragma once

#include "cpython/compat.h"

namespace optree {

// A collection in the middle of a tree would only visit what is being made, which is in no cycle yet. It
// starts with the next object that the program makes instead, if enough objects are alive then: a tree
// that replaces a freed one does not trigger a collection. Pays for up to half of unflatten on large
// trees with the collector on (benchmarks/optree).
//
// Python code has to find the collector as the program left it. Without the interpreter lock other
// threads would not, so nothing is postponed there.
class CollectorPause {
  public:
#if PY_VERSION_HEX >= 0x030A0000 && !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED)
    static bool has_effect() noexcept { return PyGC_IsEnabled() != 0; }
    // Lets a collection start that is due already: a program that makes nothing but large trees would postpone
    // it for ever. A freed cell is not kept for reuse, so the next one always counts.
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
